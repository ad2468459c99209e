"""Whether rows that were written are what an exact computation gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grass_lib.evaluation.ranks import spearman
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


def score_agreement(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether two sets of rows of the same samples rank them alike: by inner products of each row with all others.

    Args:
        found: ``{layer: (n, k)}``, of three samples or more.
        wanted: The same, computed in another way.

    Returns:
        ``scored_rows``, and over rows the mean and the lowest of Spearman's correlation between the inner products with
        the other rows: ``mean_spearman``, ``worst_spearman``; None where a correlation is not defined.
    """
    left, right = _others(found), _others(wanted)
    values = spearman(left, right)
    defined = bool(values.isfinite().all())
    return {
        "scored_rows": left.shape[1],
        "mean_spearman": float(values.mean()) if defined else None,
        "worst_spearman": float(values.min()) if defined else None,
    }


def _others(rows: Mapping[str, Tensor]) -> Tensor:
    """Inner products ``(n - 1, n)`` of every row with the other ones."""
    scores = torch.stack([part.double() @ part.double().T for part in rows.values()]).sum(dim=0)
    n = len(scores)
    return scores[~torch.eye(n, dtype=torch.bool)].view(n, n - 1).T


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
