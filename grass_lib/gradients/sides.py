"""Stage 1 of a factored compression: one side of a layer's gradient, made shorter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection import Mask, build_projector
from grass_lib.specs import StageSpec

# Rows of the unit matrix that are projected at once.
_UNIT_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Side:
    """A linear map of one side, ``(d,)`` to ``(k,)``, held in the form that is cheapest to apply.

    Exactly one of three: kept coordinates (``index``), a small dense matrix (``matrix``), or nothing at all.

    Attributes:
        d: Input size.
        k: Output size.
        index: Kept coordinates, int64 ``(k,)`` ascending; None where it is no mask.
        matrix: ``(d, k)``: ``x @ matrix`` is the result; None where it is no dense map.
        scale: Factor of kept coordinates.
    """

    d: int
    k: int
    index: Tensor | None = None
    matrix: Tensor | None = None
    scale: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether the side stays as it is."""
        return self.index is None and self.matrix is None

    def applied(self, dtype: torch.dtype) -> Tensor | None:
        """The dense map in the type in which it is applied; None where there is none."""
        return None if self.matrix is None else self.matrix.to(dtype)

    def at_rest(self, dtype: torch.dtype) -> Side:
        """The side with a matrix that is applied in another type moved to the CPU, where it takes no device memory."""
        if self.matrix is None or self.matrix.dtype == dtype:
            return self
        return replace(self, matrix=self.matrix.cpu())

    def dense(self) -> Tensor:
        """The map as a matrix ``(d, k)`` in float64 on the CPU, whatever its form."""
        if self.matrix is not None:
            return self.matrix.double().cpu()
        unit = torch.eye(self.d, dtype=torch.float64)
        return unit if self.index is None else unit[:, self.index.cpu()] * self.scale


def given_side(stage: StageSpec, place: int, d: int, matrix: Tensor, *, name: str) -> Side:
    """A side with a matrix that somebody else has drawn.

    Args:
        stage: A factored stage of a dense type, which says the size.
        place: 0 for the output side, 1 for the input side.
        d: Size of the side, the bias column of an input side included.
        matrix: ``(d, k)``.
        name: Of the side, for errors.

    Raises:
        UsageError: The matrix has another shape.
    """
    k = stage.dims[place]
    if matrix.shape != (d, k):
        raise UsageError(
            f"the matrix for {name!r} has shape {tuple(matrix.shape)}; expected ({d}, {k}), as {stage} says"
        )
    return Side(d, k, matrix=matrix.contiguous())


def build_side(
    stage: StageSpec,
    place: int,
    d: int,
    *,
    name: str,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    mask: Mask | None = None,
) -> Side:
    """Builds one side of a layer.

    A mask that asks for as many coordinates as there are, or more, keeps them all, without a factor.

    Args:
        stage: A factored stage, or identity.
        place: 0 for the output side, 1 for the input side.
        d: Size of the side, the bias column of an input side included.
        name: Of the side's random stream.
        seed: The run's seed.
        device: Where the side is applied.
        dtype: Of the matrix: float64 for float64 models, else float32.
        mask: Kept coordinates of a selective stage.

    Raises:
        UsageError: A mask is missing or does not fit.
        SpecError: The type cannot have so many outputs.
    """
    if stage.is_identity:
        return Side(d, d)
    k = stage.dims[place]
    if stage.is_mask and k >= d:
        return Side(d, d)
    if stage.needs_mask_file and mask is None:
        raise UsageError(
            f"{stage} needs a mask for {name!r} ({k} of {d} coordinates); give masks={{...}} with an entry of that name"
        )
    flat = StageSpec(stage.family, (k,), stage.param)
    projector = build_projector(
        flat, d, seed=seed, name=name, device="cpu" if stage.is_mask else device, dtype=dtype, mask=mask
    )
    if stage.is_mask:
        index = getattr(projector, "indices", None)
        if index is None:
            raise UsageError(f"{stage} gave no kept coordinates; this is a defect of the mask's projector")
        return Side(d, k, index=index.to(device), scale=float(getattr(projector, "scale", 1.0)))
    step = max(1, _UNIT_ELEMENTS // d)
    rows = [
        projector(torch.eye(min(step, d - start), d, device=device, dtype=dtype).roll(start, dims=1))
        for start in range(0, d, step)
    ]
    return Side(d, k, matrix=torch.cat(rows))
