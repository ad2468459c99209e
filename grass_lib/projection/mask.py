"""Masks: keep k coordinates and drop the others."""

from __future__ import annotations

import math

from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe


class MaskProjector(Projector):
    """``P x = x[I]``, times sqrt(p / k) for a random I, so that inner products are right in expectation.

    random_mask draws I uniformly among the sets of k coordinates (`Stream.distinct`); selective_mask takes it from a
    mask file and leaves the values as they are. The variance of ``<P x, P y>`` over random masks, with z = x * y, is
    ``p (p - k) / (k (p - 1)) * (sum z^2 - (sum z)^2 / p)``.

    Attributes:
        indices: int64 ``(k,)``, ascending, on the projector's device.
        scale: Factor of the kept values.
    """

    def __init__(self, recipe: Recipe) -> None:
        k = recipe.stage.mask_size
        if k is None:
            raise UsageError(f"{recipe.stage} is not a flat mask")
        super().__init__(recipe, k)
        if recipe.stage.needs_mask_file:
            if recipe.mask is None:
                raise UsageError(
                    f"{recipe.stage} needs a mask of {k} out of {recipe.p} coordinates; give mask=, a Mask or the path "
                    "of a mask file"
                )
            recipe.mask.check(k, recipe.p)
            self.indices = recipe.mask.indices.to(self.device)
            self.scale = 1.0
        else:
            self.indices = recipe.stream.distinct(k, recipe.p, device=self.device)
            self.scale = math.sqrt(recipe.p / k)

    @property
    def paper_scale(self) -> float:
        """The reference does not scale masks: sqrt(k / p) for a random one, 1 for a selective one."""
        return 1.0 / self.scale

    def _project(self, rows: Tensor) -> Tensor:
        kept = rows.index_select(1, self.indices).to(self.accumulate_dtype)
        return kept if self.scale == 1.0 else kept.mul_(self.scale)
