"""A projector that begins with a mask, for inputs of which only some coordinates were ever computed."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector
from grass_lib.projection.grass import ComposedProjector
from grass_lib.projection.mask import MaskProjector


def leading_mask(projector: Projector) -> tuple[MaskProjector, tuple[Projector, ...]] | None:
    """The mask that a projector begins with and what follows it, or None where it begins with anything else."""
    if isinstance(projector, MaskProjector):
        return projector, ()
    if isinstance(projector, ComposedProjector):
        found = leading_mask(projector.first)
        return None if found is None else (found[0], (*found[1], projector.second))
    return None


class RestrictedProjector(Projector):
    """The projector itself, on ``x[kept]`` instead of ``x``: same streams, same scales, same result to rounding.

    Attributes:
        p: Number of coordinates that are given, not of those that the mask chose from.
    """

    def __init__(self, projector: Projector, kept: Tensor) -> None:
        """Finds the coordinates of the mask among the given ones.

        Args:
            projector: Begins with a mask.
            kept: int64 ``(m,)``, ascending: coordinates that inputs will hold.

        Raises:
            UsageError: The projector does not begin with a mask, or coordinates of it are not given.
        """
        found = leading_mask(projector)
        if found is None:
            raise UsageError(f"{projector.spec} does not begin with a mask; expected random_mask, grass or the like.")
        mask, self._rest = found
        indices, kept = mask.indices, kept.to(projector.device)
        places = torch.searchsorted(kept, indices).clamp_(max=len(kept) - 1)
        missing = indices[kept[places] != indices]
        if len(missing):
            raise UsageError(
                f"{projector.spec} keeps coordinate {int(missing[0])} and {len(missing) - 1} more that are not among "
                f"the {len(kept)} given ones; give the union of all masks."
            )
        self.spec, self.p, self.k = projector.spec, len(kept), projector.k
        self.device, self.dtype, self.backend = projector.device, projector.dtype, projector.backend
        self._paper_scale, self._scale = projector.paper_scale, mask.scale
        self._places = None if len(indices) == len(kept) else places

    @property
    def paper_scale(self) -> float:
        """That of the projector."""
        return self._paper_scale

    def _project(self, rows: Tensor) -> Tensor:
        wide = self.accumulate_dtype
        kept = rows.to(wide, copy=True) if self._places is None else rows.index_select(1, self._places).to(wide)
        kept = kept if self._scale == 1.0 else kept.mul_(self._scale)
        for projector in self._rest:
            kept = projector(kept)
        return kept.to(wide)
