"""Quality of the block-permuted SJLT beside the plain one: variance of inner products and norms over seeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection import build_projector

LIMIT = 0.03
"""blocksjlt may be a default only where its variance is within this share of sjlt's on every kind of vector."""


@dataclass(frozen=True)
class Quality:
    """Variances over seeds, summed over pairs of vectors, as ratios.

    Attributes:
        inner_to_theory: Of inner products, over the exact variance of an SJLT with c = 1.
        inner_error: Its standard error.
        norm_to_theory: The same for squared norms.
        norm_error: Its standard error.
    """

    inner_to_theory: float
    inner_error: float
    norm_to_theory: float
    norm_error: float


def measure_quality(family: str, vectors: Tensor, k: int, seeds: int) -> Quality:
    """Measures an operator with one entry a column.

    Args:
        family: ``"sjlt"`` or ``"blocksjlt"``.
        vectors: ``(n, p)``, n at least 2; brought to length 1.
        k: Output dimension.
        seeds: Independent operators.

    Raises:
        UsageError: Fewer than two vectors or seeds.
    """
    if vectors.dim() != 2 or len(vectors) < 2 or seeds < 2:
        raise UsageError(
            f"got vectors of shape {tuple(vectors.shape)} and {seeds} seeds; expected (n >= 2, p) and 2 or more"
        )
    x = torch.nn.functional.normalize(vectors.double(), dim=1)
    exact = x @ x.t()
    squares = (x**2) @ (x**2).t()
    theory = (1.0 + exact**2 - 2.0 * squares) / k
    deviations = []
    for seed in range(seeds):
        y = build_projector(f"{family}-{k}", x.shape[1], seed=seed, dtype=torch.float32)(x.float()).double()
        deviations.append((y @ y.t() - exact) ** 2)
    found = torch.stack(deviations)
    upper = torch.triu(torch.ones_like(exact, dtype=torch.bool), 1)
    inner = found[:, upper].sum(1) / theory[upper].sum()
    norm = found.diagonal(dim1=1, dim2=2).sum(1) / theory.diagonal().sum()
    root = seeds**0.5
    return Quality(float(inner.mean()), float(inner.std() / root), float(norm.mean()), float(norm.std() / root))
