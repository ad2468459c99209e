"""Coordinates with the largest second moment: one walk over the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.masks.objective import top_k
from grass_lib.masks.source import GradientSource, check_nonzero


def second_moments(source: GradientSource) -> Tensor:
    """Mean square of every coordinate, in one walk; holds 16 bytes a coordinate and a block.

    Rows are added one by one in float64, where the square of a float32 is exact: the result does not depend on the
    block size, and equal columns have equal sums.

    Args:
        source: ``(n, p)`` in blocks.

    Returns:
        float64 ``(p,)``.

    Raises:
        UsageError: A gradient is not finite, or all are zero.
    """
    total = torch.zeros(source.p, dtype=torch.float64, device=source.device)
    for block in source:
        add_squares(total, block)
    check_nonzero(total)
    return total / source.n


def add_squares(total: Tensor, block: Tensor) -> None:
    """Adds the squares of the rows ``(batch, p)`` to a float64 sum ``(p,)``."""
    for row in block:
        wide = row.to(torch.float64)
        total.addcmul_(wide, wide)


def fit_energy(source: GradientSource, k: int) -> tuple[Tensor, Tensor]:
    """The k coordinates with the largest second moment; of equal ones the first.

    Args:
        source: ``(n, p)`` in blocks.
        k: Number of coordinates.

    Returns:
        Indices ``(k,)``, ascending, and their second moments.
    """
    energy = second_moments(source)
    indices = top_k(energy, k)
    return indices, energy[indices]
