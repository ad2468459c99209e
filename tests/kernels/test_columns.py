"""Kept columns on a CPU."""

import pytest
import torch

from grass_lib.kernels.columns import kept_columns


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("shape", "k"), [((3, 7, 40), 5), ((1, 2), 1), ((5, 13, 300), 127), ((4, 64), 64), ((9,), 3)])
def test_columns_are_taken(shape, k, ones):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    index = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(1))[:k].sort().values
    found = kept_columns(x, index, ones)
    assert found.shape == (*shape[:-1], k + ones)
    assert torch.equal(found[..., :k], x[..., index])
    assert not ones or bool((found[..., k] == 1).all())
