"""Mean and variance of inner products over seeds, for every projector, against theory.

The Gram matrix A = P P^T of all unit vectors is collected over seeds. Its mean must be the identity, and the second
moment of every off-diagonal entry must be what theory says: a wrong scale, a hash that repeats between two columns or
blocks, or a sign with a bias moves one of them by far more than the bounds.
"""

import math
from functools import cache

import pytest
import torch

from grass_lib.projection import build_projector

P, SEEDS = 40, 400


@cache
def grams(text: str) -> torch.Tensor:
    """``(SEEDS, P, P)``: one Gram matrix per seed."""
    eye = torch.eye(P)
    projected = [build_projector(text, P, seed=seed)(eye).double() for seed in range(SEEDS)]
    return torch.stack([rows @ rows.T for rows in projected])


def second_moments(text: str) -> torch.Tensor:
    """Theory: E[A_ij^2] off the diagonal and Var[A_ii] on it, ``(P, P)``."""
    family, k = text.split("-")[0], int(text.split("-")[1])
    off, on = torch.full((P, P), 1.0 / k, dtype=torch.float64), 0.0
    if family == "normal":
        on = 2.0 / k
    elif family == "sjlt_3":
        on = 2.0 * (1 - 1 / 3) / k
    elif family == "fjlt":
        n = 1 << (k - 1).bit_length()
        block = torch.arange(P) // n
        off[block[:, None] == block] = (n - k) / (k * (n - 1))
    elif family == "random_mask":
        off.zero_()
        on = P / k - 1
    elif family == "grass_2":
        q = 2 * k
        off *= (P / q) ** 2 * q * (q - 1) / (P * (P - 1))
        on = P / q - 1
    return off.fill_diagonal_(on)


SPECS = ["normal-8", "rademacher-8", "sjlt-8", "sjlt_3-8", "fjlt-8", "fjlt-6", "random_mask-10", "grass_2-8"]


@pytest.mark.parametrize("text", SPECS)
def test_mean_of_all_inner_products(text):
    error = grams(text).mean(0) - torch.eye(P)
    bound = 6 * (second_moments(text) / SEEDS).sqrt() + 1e-6
    assert (error.abs() <= bound).all(), (error.abs() / bound).max()
    # All entries together are far sharper than each alone: a common bias of the signs would show here.
    pairs = error[~torch.eye(P, dtype=torch.bool)]
    assert abs(pairs.mean()) < 6 * math.sqrt(2.0 / (8 * SEEDS * pairs.numel()))
    trace = error.diagonal().mean()
    assert abs(trace) <= 6 * math.sqrt(second_moments(text)[0, 0] / (SEEDS * P)) + 1e-6


@pytest.mark.parametrize("text", SPECS)
def test_second_moment_of_every_pair(text):
    gram, theory = grams(text), second_moments(text)
    found = (gram - torch.eye(P)).square()
    # An entry's own spread is small when its mean happens to be; the spread of all of them is the floor.
    own = found.var(0)
    spread = torch.maximum(own, own[theory > 0].mean()).sqrt() / math.sqrt(SEEDS)
    assert ((found.mean(0) - theory).abs() <= 6 * spread + 1e-6).all()
    off = ~torch.eye(P, dtype=torch.bool)
    assert found.mean(0)[off].mean() == pytest.approx(float(theory[off].mean()), rel=0.05, abs=1e-6)
    assert found.mean(0).diagonal().mean() == pytest.approx(float(theory.diagonal().mean()), rel=0.08, abs=1e-6)


@pytest.mark.parametrize("text", SPECS)
def test_variance_of_an_inner_product(text):
    """For dense x and y: var = sum over pairs of (x_i y_j + x_j y_i)^2 E[A_ij^2], plus the diagonal's part."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, P, dtype=torch.float64, generator=generator)
    y = y + 0.5 * x
    values = torch.einsum("i,sij,j->s", x, grams(text), y)
    theory = second_moments(text)
    cross = x[:, None] * y + y[:, None] * x
    variance = (cross.square() * theory).triu(1).sum()
    z = x * y
    if text.startswith(("random_mask", "grass")):
        # Kept or not is decided for k coordinates together: the diagonal entries are correlated.
        q = 10 if text.startswith("random_mask") else 16
        variance += P * (P - q) / (q * (P - 1)) * (z.square().sum() - z.sum() ** 2 / P)
    else:
        variance += (theory.diagonal() * z.square()).sum()
    assert values.mean() == pytest.approx(float(x @ y), abs=5 * math.sqrt(variance / SEEDS))
    assert values.var() == pytest.approx(float(variance), rel=0.35)


@pytest.mark.parametrize("text", ["normal-8", "rademacher-8", "sjlt-8", "sjlt_3-8", "fjlt-8", "fjlt-6"])
def test_entries_have_no_bias(text):
    """Every entry of the matrix has mean 0, and so has their sum along rows and columns."""
    eye = torch.eye(P)
    total = torch.stack([build_projector(text, P, seed=seed)(eye).double() for seed in range(SEEDS)]).mean(0)
    deviation = 1 / math.sqrt(8 if text[-1] == "8" else 6)
    assert total.abs().max() < 6 * deviation / math.sqrt(SEEDS)
    assert abs(total.mean()) < 6 * deviation / math.sqrt(SEEDS * total.numel())


@pytest.mark.parametrize("text", ["fjlt-8", "fjlt-6"])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_fjlt_equal_positions_of_two_blocks(text, position):
    """Rows in one common order, or without signs, would make these inner products 1 or -1 for every seed."""
    k = int(text[-1])
    values = grams(text)[:, position, 8 + position]
    assert values.square().mean() == pytest.approx(1 / k, rel=0.4)
    assert abs(values.mean()) < 6 / math.sqrt(k * SEEDS)
    assert (values.abs() > 0.99).double().mean() < 0.2


def test_mask_keeps_every_coordinate_equally_often():
    kept = (grams("random_mask-10").diagonal(dim1=1, dim2=2) > 0).double().mean(0)
    assert (kept - 10 / P).abs().max() < 5 * math.sqrt(0.25 * 0.75 / SEEDS)
