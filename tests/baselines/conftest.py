"""A tiny language model and its data."""

import pytest
import torch
from baseline_tools import SIZES

from grass_lib.baselines import ModelShape, Workload


@pytest.fixture
def workload():
    generator = torch.Generator().manual_seed(0)
    train, query = (torch.randint(0, 64, (n, 16), generator=generator) for n in (24, 6))
    return Workload(ModelShape("gpt2", SIZES), train, query, batch_size=8)
