"""The projector that changes nothing but the dtype."""

from __future__ import annotations

from torch import Tensor

from grass_lib.projection.base import Projector, Recipe


class IdentityProjector(Projector):
    """``P x = x``; k is p."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe, recipe.p)

    def _project(self, rows: Tensor) -> Tensor:
        return rows.to(self.accumulate_dtype, copy=True)
