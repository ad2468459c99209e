"""How far two choices of coordinates agree."""

from __future__ import annotations

from torch import Tensor


def overlap(first: Tensor, second: Tensor) -> float:
    """Share of the coordinates of the first choice that the second has too.

    Args:
        first: ``(k,)``, distinct.
        second: ``(k,)``, distinct.
    """
    return len(set(first.tolist()) & set(second.tolist())) / max(1, len(first))
