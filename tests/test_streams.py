"""Pieces side by side: the same results in the same order, and the first exception."""

import pytest
import torch

from grass_lib.streams import on_streams

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DEVICES = [
    CPU,
    pytest.param(
        GPU,
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_results_come_in_order(device, at_once):
    def work(size):
        matrix = torch.eye(size, device=device, dtype=torch.float64) * size
        return torch.linalg.eigh(matrix)[0]

    sizes = [200, 3, 120, 7, 1, 64, 65, 2]
    found = list(on_streams(work, sizes, device, at_once))
    assert [len(values) for values in found] == sizes
    assert all((values == size).all() for values, size in zip(found, sizes, strict=True))
    assert list(on_streams(work, [], device, at_once)) == []


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_the_first_exception_is_raised_and_what_had_not_begun_is_left_out(device):
    begun = []

    def work(piece):
        begun.append(piece)
        if piece >= 2:
            raise ValueError(f"piece {piece}")
        return piece

    found = on_streams(work, range(100), device, 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="piece 2"):
        next(found)
    assert len(begun) < 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_the_current_stream_computes_is_waited_for_and_results_can_be_used_there():
    source = torch.zeros(1 << 20, device="cuda")
    torch.cuda._sleep(100_000_000)
    source += 1
    total = sum(on_streams(lambda factor: source * factor, [1, 2, 3, 4], GPU, 4))
    assert (total == 10).all()
