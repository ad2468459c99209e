"""What all projectors share: the checks, the dtype rule and the recipe that they are built from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.mask_file import Mask
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec, StageSpec

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Recipe:
    """All that a projector of one flat stage is built from.

    Attributes:
        stage: The stage.
        p: Input size.
        stream: Random stream of the stage. A grass stage takes its mask from here.
        inner: Random stream of what follows the mask inside a grass stage.
        device: Where the projector computes, with an index for CUDA.
        dtype: Output dtype.
        backend: "torch", or the name of an optional package.
        mask: Kept coordinates of a selective stage.
    """

    stage: StageSpec
    p: int
    stream: Stream
    inner: Stream
    device: torch.device
    dtype: torch.dtype
    backend: str = "torch"
    mask: Mask | None = None

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int) or self.p < 1:
            raise UsageError(f"p is {self.p!r}; expected the number of input coordinates, an int of 1 or more")
        if self.dtype not in _DTYPES:
            raise UsageError(f"dtype is {self.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
        self.stage.check_input(self.p)

    def with_stage(self, stage: StageSpec, p: int, stream: Stream) -> Recipe:
        """The same recipe for another stage."""
        return replace(self, stage=stage, p=p, stream=stream)


class Projector(ABC):
    """A linear map from ``(..., p)`` to ``(..., k)``; build one with ``build_projector``.

    Equal ``(spec, p, seed, name, checkpoint)`` give the same numbers on every device, for every batch size. Half types
    and float32 accumulate in float32; a float64 projector accumulates in float64.

    Attributes:
        spec: What was asked for.
        p: Input size.
        k: Output size.
        device: Device of inputs and outputs.
        dtype: Output dtype.
        backend: "torch", or the optional package that does the work.
    """

    backend: str = "torch"

    def __init__(self, recipe: Recipe, k: int) -> None:
        self.spec: StageSpec | CompressionSpec = recipe.stage
        self.p = recipe.p
        self.k = k
        self.device = recipe.device
        self.dtype = recipe.dtype

    @property
    def paper_scale(self) -> float:
        """Factor by which the output of the reference's operator differs from ours (REFERENCE: 1 where they agree)."""
        return 1.0

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The type that sums are computed in: float64 for a float64 projector, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Projects; not differentiable.

        Args:
            x: ``(..., p)``, a floating type, on the projector's device. Any strides; it is not changed.

        Returns:
            ``(..., k)`` in the projector's dtype; a batch of no samples gives ``(0, k)``.

        Raises:
            UsageError: Wrong size, dtype or device.
        """
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(f"{self.spec} got {seen}; expected a tensor of a floating type")
        if x.dim() == 0 or x.shape[-1] != self.p:
            raise UsageError(f"{self.spec} got shape {tuple(x.shape)}; expected (..., {self.p}), its p")
        if x.device != self.device:
            raise UsageError(
                f"{self.spec} was built for {self.device}, and the input is on {x.device}; build it with "
                f"device={str(x.device)!r}, or move the input"
            )
        rows = x.reshape(-1, self.p) if x.numel() else x.new_empty((math.prod(x.shape[:-1]), self.p))
        out = self._project(rows) if rows.shape[0] else rows.new_empty((0, self.k))
        return out.to(self.dtype).reshape(*x.shape[:-1], self.k)

    @abstractmethod
    def _project(self, rows: Tensor) -> Tensor:
        """Maps ``(n, p)``, n >= 1, any floating dtype, to a new ``(n, k)`` tensor in the accumulate dtype."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec}, p={self.p}, k={self.k}, device={self.device}, dtype={self.dtype})"


def tile_elements(device: torch.device, dtype: torch.dtype) -> int:
    """Elements of a scratch tile: 4 MiB on a CPU, to stay near its caches; 256 MiB elsewhere, for few launches."""
    return (4 << 20 if device.type == "cpu" else 256 << 20) // dtype.itemsize
