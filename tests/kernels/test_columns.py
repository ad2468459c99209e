"""Kept columns on a CPU."""

import pytest
import torch

from grass_lib.kernels import columns
from grass_lib.kernels.columns import ColumnsMoved, kept_columns


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("shape", "k"), [((3, 7, 40), 5), ((1, 2), 1), ((5, 13, 300), 127), ((4, 64), 64), ((9,), 3)])
def test_columns_are_taken(shape, k, ones):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(1))[:k].sort().values
    found = kept_columns(x, index, ones)
    assert found.shape == (*shape[:-1], k + ones)
    assert torch.equal(found[..., :k], x[..., index])
    assert not ones or bool((found[..., k] == 1).all())


class Stream:
    """Notes who waits for it."""

    device = torch.device("cuda", 0)

    def __init__(self):
        self.waited = []

    def wait_stream(self, other):
        self.waited.append(other)


def test_what_is_copied_beside_has_to_be_held(monkeypatch):
    main, stream, copied = Stream(), Stream(), []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: columns.beside(torch.device("cpu")))
    monkeypatch.setattr(columns, "_launch", lambda *given: copied.append(given))
    side = columns._Side(Stream.device)
    assert not side.serves(torch.ones(3, 4))  # of a CPU
    x, index, out = torch.ones(3, 4), torch.tensor([0, 2]), torch.ones(3, 2)
    side.join([])
    assert main.waited == []  # nothing runs
    for held in ([], [x], [out, x], [x.clone(), out], [x, out.clone()]):
        side.run(x, index, False, out)
        with pytest.raises(ColumnsMoved, match="not held"):
            side.join(held)
    side.run(x, index, False, out)
    side.join([x, out])
    assert len(copied) == len(main.waited) == len(stream.waited) == 6
    assert set(main.waited) == {stream}
    assert set(stream.waited) == {main}
