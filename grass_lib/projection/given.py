"""A dense projection with a matrix that somebody else has drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe
from grass_lib.rng import Stream
from grass_lib.specs import StageSpec


class GivenProjector(Projector):
    """``P x = x @ matrix``, for results that have to be compared with another system's on its own numbers."""

    backend = "given"

    def __init__(
        self, stage: StageSpec, matrix: Tensor, *, p: int, name: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Checks the matrix against the stage whose place it takes.

        Args:
            stage: A flat stage, which says the output size.
            matrix: ``(p, k)``.
            p: Input size.
            name: What is projected, for errors.
            device: Of inputs and outputs.
            dtype: Of outputs.

        Raises:
            UsageError: The matrix has another shape.
        """
        if stage.k is None or matrix.shape != (p, stage.k):
            raise UsageError(
                f"the matrix for {name!r} has shape {tuple(matrix.shape)}; expected ({p}, {stage.k}), as {stage} says"
            )
        stream = Stream(0, name, "projection")
        super().__init__(Recipe(StageSpec("identity"), p, stream, stream, device, dtype), stage.k)
        self.spec = stage
        self._matrix = matrix.to(device, self.accumulate_dtype).contiguous()

    def _project(self, rows: Tensor) -> Tensor:
        return rows.to(self.accumulate_dtype) @ self._matrix
