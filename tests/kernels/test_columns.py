"""Kept columns on a CPU, and the way that sends every element to its place."""

import pytest
import torch

from grass_lib.kernels.columns import KeptColumns, scattered_columns


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("shape", "k"), [((3, 7, 40), 5), ((1, 2), 1), ((5, 13, 300), 127), ((4, 64), 64), ((9,), 3)])
def test_both_ways_take_the_same_columns(shape, k, ones):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(1))[:k].sort().values
    found = KeptColumns(index, shape[-1], ones=ones)(x)
    assert found.shape == (*shape[:-1], k + ones)
    assert torch.equal(found[..., :k], x[..., index])
    assert not ones or bool((found[..., k] == 1).all())
    places = torch.full((shape[-1],), k + ones)
    places[index] = torch.arange(k)
    rows = x.reshape(-1, shape[-1])
    assert torch.equal(scattered_columns(rows, places, k, ones), found.reshape(len(rows), k + ones))
