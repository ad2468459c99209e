"""The projectors of ``backend="kernel"``: the reference's tables and streams, with the sums done by a GPU kernel."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.kernels import nvrtc
from grass_lib.kernels.dense import NormalKernel, RademacherKernel
from grass_lib.kernels.fjlt import LARGEST_BITS, FjltKernel
from grass_lib.kernels.mask import GatherKernel
from grass_lib.kernels.sjlt import SjltKernel
from grass_lib.projection.base import Projector, Recipe
from grass_lib.projection.blocksjlt import BlockSJLTProjector
from grass_lib.projection.dense import NormalProjector, RademacherProjector
from grass_lib.projection.fjlt import FJLTProjector
from grass_lib.projection.grass import ComposedProjector
from grass_lib.projection.mask import MaskProjector
from grass_lib.projection.sjlt import SJLTProjector

# The kernel draws the matrix anew for every block of rows, PyTorch only once for all of them. Measured on an H200, both
# take the same time at 512 rows; the kernel's grows with their number from there, PyTorch's hardly does.
_NORMAL_ROWS = 512
_LARGEST_P = 1 << 32  # columns are 32-bit counters in the dense kernels


def missing_for_recipe(recipe: Recipe) -> str | None:
    """Says why ``backend="kernel"`` cannot serve a stage here, or None where it can."""
    if recipe.device.type != "cuda":
        return f"the device is {recipe.device}, no CUDA GPU"
    reason = nvrtc.missing_for_kernels()
    if reason:
        return reason
    family = recipe.stage.family
    if recipe.dtype == torch.float64:
        return "the kernels accumulate in float32, and float64 was asked for"
    if recipe.p >= _LARGEST_P:
        return f"the kernels take up to {_LARGEST_P - 1} coordinates, p is {recipe.p}"
    if family == "fjlt" and recipe.stage.k is not None and (recipe.stage.k - 1).bit_length() > LARGEST_BITS:
        return f"the transform takes k up to {1 << LARGEST_BITS}, k is {recipe.stage.k}"
    if family == "normal" and importlib.util.find_spec("triton") is None:
        return "normal needs the package triton, which is missing"
    if family == "rademacher" and torch.cuda.get_device_capability(recipe.device) < (8, 0):
        return "rademacher needs a GPU of compute capability 8.0 or later"
    return None


class _Kernel(Projector):
    """Shared by all: the name of the backend and the input's type."""

    backend = "kernel"
    _run: Callable[[Tensor, torch.dtype], Tensor]

    def _project(self, rows: Tensor) -> Tensor:
        if rows.dtype == torch.float64:
            rows = rows.to(torch.float32)
        # The kernels write the output's own type: half types are rounded once, in the last store.
        return self._run(rows, self.dtype)


class KernelSJLT(_Kernel, SJLTProjector):
    """`SJLTProjector` by `SjltKernel`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._run = SjltKernel(self.destinations, self.signs < 0, self.k, 1.0 / math.sqrt(self.c))


class KernelBlockSJLT(_Kernel, BlockSJLTProjector):
    """`BlockSJLTProjector` by `SjltKernel`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._run = SjltKernel(self.destinations, self.signs < 0, self.k, 1.0 / math.sqrt(self.c))


class KernelFJLT(_Kernel, FJLTProjector):
    """`FJLTProjector` by `FjltKernel`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        padded = torch.nn.functional.pad(self.signs < 0, (0, self.blocks * self.n - self.p))
        self._run = FjltKernel(padded, self.rows, self.row_signs < 0, self.p, 1.0 / math.sqrt(self.k))


class KernelNormal(_Kernel, NormalProjector):
    """`NormalProjector` by `NormalKernel`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._run = NormalKernel(self.stream.key, self.p, self.k, 1.0 / math.sqrt(self.k))

    def _project(self, rows: Tensor) -> Tensor:
        return NormalProjector._project(self, rows) if len(rows) > _NORMAL_ROWS else super()._project(rows)


class KernelRademacher(_Kernel, RademacherProjector):
    """`RademacherProjector` by `RademacherKernel`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._run = RademacherKernel(self.stream.key, self.p, self.k, 1.0 / math.sqrt(self.k), self.device)


class KernelMask(_Kernel, MaskProjector):
    """`MaskProjector` by `GatherKernel`."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._run = GatherKernel(self.indices, self.scale)


class KernelGrass(_Kernel, ComposedProjector):
    """A mask and an SJLT in one pass: only the kept coordinates are read, and nothing is stored between the two."""

    backend = "kernel"

    def __init__(self, recipe: Recipe, first: MaskProjector, second: SJLTProjector) -> None:
        super().__init__(recipe, first, second)
        self.backend = "kernel"
        scale = first.scale / math.sqrt(second.c)
        self._run = SjltKernel(second.destinations, second.signs < 0, second.k, scale, columns=first.indices)


KERNEL_FAMILIES: Mapping[str, Callable[[Recipe], Projector]] = MappingProxyType(
    {
        "normal": KernelNormal,
        "rademacher": KernelRademacher,
        "sjlt": KernelSJLT,
        "blocksjlt": KernelBlockSJLT,
        "fjlt": KernelFJLT,
        "random_mask": KernelMask,
        "selective_mask": KernelMask,
    }
)
"""What the registry builds for ``backend="kernel"``; all other families are put together from these."""


def fuse(recipe: Recipe, first: Projector, second: Projector) -> Projector | None:
    """The one-pass projector of a mask followed by an SJLT, or None for any other pair."""
    if isinstance(first, KernelMask) and isinstance(second, SJLTProjector) and second.backend == "kernel":
        return KernelGrass(recipe, first, second)
    return None


def require(recipe: Recipe) -> None:
    """Raises where ``backend="kernel"`` cannot serve a stage.

    Raises:
        UsageError: With the reason and what to do.
    """
    reason = missing_for_recipe(recipe)
    if reason:
        raise UsageError(f"backend='kernel' cannot serve {recipe.stage}: {reason}. Use backend='torch' or 'auto'.")
