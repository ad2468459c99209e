"""How kept columns are taken where PyTorch must be deterministic, on tensors of a GPU that hold nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from grass_lib.kernels import columns


@pytest.mark.parametrize("deterministic", [False, True])
def test_elements_are_sent_only_where_order_is_free(monkeypatch, deterministic):
    sent = []

    def scattered(rows, places, kept, ones):
        sent.append(places)
        return rows.new_empty(len(rows), kept + ones)

    monkeypatch.setattr(columns, "scattered_columns", scattered)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    with FakeTensorMode():
        x = torch.empty(3, 5, 64, device="cuda", dtype=torch.bfloat16)
        index = torch.empty(8, device="cuda", dtype=torch.int64)
        places = torch.empty(64, device="cuda", dtype=torch.int64)
        found = columns.kept_columns(x, index, places, True)
    assert found.shape == (3, 5, 9)
    assert bool(sent) is not deterministic
