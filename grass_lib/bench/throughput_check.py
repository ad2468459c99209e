"""Whether rows that were written are what an exact computation gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grass_lib.gradients.factored import FactoredGradients


def cosines(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The worst cosine of two sets of rows, over rows and layers.

    Args:
        found: ``{layer: (n, k)}``.
        wanted: The same, exact.

    Returns:
        ``worst_cosine``, ``worst_layer`` and ``median_cosine``; a row that is zero in both has the cosine 1.
    """
    names, values = list(wanted), []
    for name in names:
        left, right = found[name].double(), wanted[name].double()
        norms = left.norm(dim=1) * right.norm(dim=1)
        both_zero = (left.norm(dim=1) == 0) & (right.norm(dim=1) == 0)
        cosine = (left * right).sum(dim=1) / norms.clamp_min(torch.finfo(torch.float64).tiny)
        values.append(torch.where(both_zero, 1.0, cosine))
    every = torch.stack(values)
    worst = int(every.min(dim=1).values.argmin())
    return {
        "worst_cosine": float(every.min()),
        "worst_layer": names[worst],
        "median_cosine": float(every.median()),
    }


def kept_positions(gradients: FactoredGradients) -> float | None:
    """Mean of where masks' kept coordinates lie in their sides, 0 to 1: 0.5 for uniformly random ones.

    None where there are no masks.
    """
    found = []
    for name in gradients.sizes:
        for side in gradients.sides(name):
            if side.index is not None and side.d > 1:
                found.append(float(side.index.double().mean()) / (side.d - 1))
    return sum(found) / len(found) if found else None
