"""Ridge leverage scores of coordinates: how much of the space of samples a coordinate spans beyond the others.

With column g_j of the gradients G ``(n, p)``, ``tau_j = g_j^T (G G^T + lambda I)^-1 g_j`` (Alaoui and Mahoney, "Fast
randomized kernel ridge regression with statistical guarantees", 2015). Where n is large, G is first sketched by random
signs to s rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.masks.objective import top_k
from grass_lib.masks.source import GradientSource, check_nonzero
from grass_lib.rng import Stream

# Fixed, so that sums round alike whatever the source's blocks: rows of a chunk, and columns of a block.
_CHUNK, _COLUMNS = 64, 1 << 14


def leverage_scores(
    source: GradientSource, *, seed: int = 0, name: str = "", sketch: int = 512, ridge: float = 0.1
) -> Tensor:
    """Ridge leverage scores in one walk; holds ``4 p (min(n, sketch) + 64)`` bytes.

    Args:
        source: ``(n, p)`` in blocks.
        seed: Of the random signs.
        name: Of the random signs.
        sketch: Rows of the sketch; with n rows or fewer there is none, and the scores are exact.
        ridge: lambda as a multiple of the mean eigenvalue of the (sketched) Gram matrix.

    Returns:
        float64 ``(p,)`` in [0, 1).

    Raises:
        UsageError: An option is out of range, a gradient is not finite, or all are zero.
    """
    if sketch < 1 or not 0.0 < ridge < math.inf:
        raise UsageError(f"sketch is {sketch} and ridge {ridge}; expected at least 1 row, and a ridge above 0")
    exact = source.n <= sketch
    size = source.n if exact else sketch
    held = torch.zeros(size, source.p, device=source.device)
    stream = Stream(seed, name, "mask/leverage")
    for first, rows in source.chunks(_CHUNK):
        if exact:
            held[first : first + len(rows)] = rows
        else:
            signs = stream.integers(2, (len(rows), size), offset=first * size, device=source.device)
            signs = signs.to(torch.float32).mul_(2.0).sub_(1.0).mul_(size**-0.5)
            held.addmm_(signs.mT, rows)
    largest = held.abs().max()
    check_nonzero(largest[None])
    held /= largest  # the scores do not depend on the scale, and float64 sums of squares cannot underflow
    gram = torch.zeros(size, size, dtype=torch.float64, device=source.device)
    for part in held.split(_COLUMNS, dim=1):
        wide = part.to(torch.float64)
        gram.addmm_(wide, wide.mT)
    gram.diagonal().add_(ridge * float(gram.trace()) / size)
    factor = torch.linalg.cholesky(gram)
    parts = [
        torch.linalg.solve_triangular(factor, part.to(torch.float64), upper=False).square().sum(dim=0)
        for part in held.split(_COLUMNS, dim=1)
    ]
    return torch.cat(parts)


def fit_leverage(
    source: GradientSource, k: int, *, seed: int = 0, name: str = "", sketch: int = 512, ridge: float = 0.1
) -> tuple[Tensor, Tensor]:
    """The k coordinates with the largest ridge leverage scores; arguments as in `leverage_scores`.

    Returns:
        Indices ``(k,)``, ascending, and their scores.
    """
    scores = leverage_scores(source, seed=seed, name=name, sketch=sketch, ridge=ridge)
    # Rounded, so that equal columns tie although their sums differ in the last bit.
    indices = top_k(scores.to(torch.float32), k)
    return indices, scores[indices]
