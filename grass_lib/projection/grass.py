"""Two projectors in a row: GraSS (a mask, then an SJLT) and every other flat pair."""

from __future__ import annotations

from torch import Tensor

from grass_lib.projection.base import Projector, Recipe


class ComposedProjector(Projector):
    """``P x = second(first(x))``.

    grass_N-K is random_mask-(N*K) followed by sjlt-K (the paper's GraSS), with the numbers of the two built apart;
    selective_grass takes the mask from a file. A half-precision output is rounded once, at the end.

    Attributes:
        first: Projector of the input.
        second: Projector of the first one's output.
    """

    def __init__(self, recipe: Recipe, first: Projector, second: Projector) -> None:
        super().__init__(recipe, second.k)
        self.first, self.second = first, second
        self.backend = second.backend if second.backend != "torch" else first.backend

    @property
    def paper_scale(self) -> float:
        """Product of both stages' factors: sqrt(q / p) for grass with a mask of q."""
        return self.first.paper_scale * self.second.paper_scale

    def _project(self, rows: Tensor) -> Tensor:
        return self.second(self.first(rows)).to(self.accumulate_dtype)
