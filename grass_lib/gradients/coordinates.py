"""Kept coordinates of the flat gradient, taken apart by the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError


@dataclass(frozen=True, eq=False)
class KeptPart:
    """The kept coordinates of one parameter.

    Attributes:
        name: Of the parameter.
        shape: Of the parameter.
        local: int64 ``(m,)`` on the CPU: places in the flattened parameter, ascending.
        first: Column of the first one among all kept coordinates; the others follow it.
    """

    name: str
    shape: torch.Size
    local: Tensor
    first: int

    @property
    def columns(self) -> slice:
        """Their columns among all kept coordinates."""
        return slice(self.first, self.first + len(self.local))


def check_indices(indices: Tensor, p: int) -> Tensor:
    """Checks kept coordinates and hands them back on the CPU.

    Args:
        indices: int64 ``(k,)``, ascending, distinct, each in [0, p).
        p: Number of coordinates that were chosen from.

    Raises:
        UsageError: They are something else; the first offending value is shown.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        seen = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise UsageError(f"indices are {seen}; expected an int64 tensor of shape (k,), the coordinates to keep.")
    if indices.numel() == 0:
        raise UsageError("indices are empty; expected at least one coordinate to keep.")
    indices = indices.detach().cpu()
    falls = (indices[1:] <= indices[:-1]).nonzero()
    if len(falls):
        where = int(falls[0, 0])
        raise UsageError(
            f"indices are not ascending and distinct: {int(indices[where])} is followed by {int(indices[where + 1])} "
            f"at position {where}; use indices.unique(), which sorts and drops repetitions."
        )
    low, high = int(indices[0]), int(indices[-1])
    if low < 0 or high >= p:
        raise UsageError(f"indices run from {low} to {high}; expected 0 to {p - 1}: the model has {p} weights here.")
    return indices


def split_coordinates(indices: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, KeptPart]:
    """Takes kept coordinates apart by parameter; parameters of which none is kept are left out.

    Args:
        indices: int64 ``(k,)`` on the CPU, ascending, in [0, p).
        shapes: By parameter name, in the order in which they lie in a row.
    """
    sizes = torch.tensor([shape.numel() for shape in shapes.values()])
    ends = sizes.cumsum(0)
    marks = torch.searchsorted(indices, torch.cat([ends.new_zeros(1), ends])).tolist()
    parts: dict[str, KeptPart] = {}
    for place, (name, shape) in enumerate(shapes.items()):
        first, stop = marks[place], marks[place + 1]
        if stop > first:
            parts[name] = KeptPart(name, shape, indices[first:stop] - (ends[place] - sizes[place]), first)
    return parts
