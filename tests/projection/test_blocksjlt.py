"""The block-permuted SJLT: evenly dealt, an isometry in expectation, variance as an SJLT's or lower."""

import pytest
import torch

from grass_lib.errors import SpecError
from grass_lib.projection import build_projector
from grass_lib.projection.blocksjlt import BLOCKS, TILE, block_table
from grass_lib.rng import Stream


def _variance_ratio(x: torch.Tensor, y: torch.Tensor, k: int, seeds: int) -> tuple[float, float, float]:
    """Mean of <Px, Py>, its standard error, and its variance over what an SJLT's formula gives."""
    pair = torch.stack([x, y]).double()
    products = []
    for seed in range(seeds):
        a, b = build_projector(f"blocksjlt-{k}", len(x), seed=seed, dtype=torch.float64)(pair)
        products.append(float(a @ b))
    found = torch.tensor(products, dtype=torch.float64)
    shared = (pair[0] ** 2 * pair[1] ** 2).sum()
    theory = ((pair[0] @ pair[0]) * (pair[1] @ pair[1]) + (pair[0] @ pair[1]) ** 2 - 2 * shared) / k
    return float(found.mean()), float(found.std() / seeds**0.5), float(found.var() / theory)


@pytest.mark.parametrize("k", [1, 5, 64, 100, 1000])
def test_every_tile_is_dealt_evenly(k: int) -> None:
    p = 3 * TILE
    destinations, signs = block_table(Stream(0, "", "projection"), p, k, torch.device("cpu"))
    blocks = min(BLOCKS, 1 << (k.bit_length() - 1))
    counts = torch.stack([tile.bincount(minlength=blocks) for tile in (destinations[:, 0] % blocks).view(-1, TILE)])
    assert (counts == TILE // blocks).all()
    assert destinations.min() >= 0
    assert destinations.max() < k
    assert set(signs.unique().tolist()) <= {-1, 1}
    if k >= 64:
        assert destinations.unique().numel() > 0.9 * k


def test_a_longer_vector_has_the_same_first_columns() -> None:
    short = block_table(Stream(0), 1500, 100, torch.device("cpu"))
    long = block_table(Stream(0), 5000, 100, torch.device("cpu"))
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b[:1500])


def test_mean_and_variance_of_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 4 * TILE, generator=generator)
    y = y + 0.5 * x
    mean, error, ratio = _variance_ratio(x, y, 128, 300)
    assert abs(mean - float(x.double() @ y.double())) < 4 * error
    assert 0.75 < ratio < 1.3


def test_energy_in_one_tile_does_not_raise_the_variance() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.zeros(2, 4 * TILE)
    x[TILE : 2 * TILE], y[TILE : 2 * TILE] = torch.randn(2, TILE, generator=generator)
    mean, error, ratio = _variance_ratio(x, y, 128, 300)
    assert abs(mean - float(x.double() @ y.double())) < 4 * error
    assert ratio < 1.25


def test_spec() -> None:
    assert str(build_projector("blocksjlt-16", 5).spec) == "blocksjlt-16"
    with pytest.raises(SpecError):
        build_projector("blocksjlt_2-16", 50)
