"""The optional CUDA packages ``sjlt`` and ``fast_jl`` as backends; chosen by name, never silently.

Both are imported when a projector is built with them, not before: they need a GPU and are compiled by ``make cuda``.
"""

from __future__ import annotations

import importlib
import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe
from grass_lib.projection.sjlt import sjlt_table

# The package keeps a column's nonzeros in arrays of 16 entries and does not check.
_MAX_C = 16
# Its kernel computes b * p + j and b * k + r in 32 bits.
_MAX_ELEMENTS = 2**31 - 1
# Input coordinates per tile of fast_jl, whose tiles begin with related signs: with 128 tiles on an H200, norms of
# projections to 4096 spread by 8 % at p = 5,000 and 1.8 % at p = 109,386; with tiles of this size or more by the 1.1 %
# of independent signs.
_TILE_COORDINATES = 8192
_MAX_TILES = 128


class SJLTPackageProjector(Projector):
    """`SJLTProjector` through the package ``sjlt``, its tables filled from our stream: the same operator.

    The package adds with float atomics, so sums agree to rounding and are not reproducible bit for bit.
    """

    backend = "sjlt"

    def __init__(self, recipe: Recipe) -> None:
        stage = recipe.stage
        if stage.k is None or stage.param is None:
            raise UsageError(f"{stage} is not a flat sjlt")
        if stage.param > _MAX_C or stage.param > stage.k:
            raise UsageError(
                f"{stage} has {stage.param} nonzeros per column, and the package sjlt takes at most "
                f"{min(_MAX_C, stage.k)} here; use backend='torch'"
            )
        if max(recipe.p, stage.k) > _MAX_ELEMENTS:
            raise UsageError(f"{stage} with p={recipe.p} overflows the package's 32-bit indices; use backend='torch'")
        package = _import("sjlt", recipe)
        if not getattr(package, "EXTENSION_AVAILABLE", False):
            raise UsageError("the package sjlt was installed without its CUDA extension; run `make cuda` on this GPU")
        super().__init__(recipe, stage.k)
        # Its constructor draws from torch's global generator; the caller's random state must not move.
        with torch.cuda.device(self.device), torch.random.fork_rng([self.device]):
            self._module = package.SJLTProjection(self.p, self.k, c=stage.param, device=self.device)
        indices, signs = sjlt_table(recipe.stream, self.p, self.k, stage.param, self.device)
        self._module.rand_indices.copy_(indices)
        self._module.rand_signs.copy_(signs)

    def _project(self, rows: Tensor) -> Tensor:
        out = torch.empty((rows.shape[0], self.k), dtype=self.accumulate_dtype, device=self.device)
        step = max(1, _MAX_ELEMENTS // max(self.p, self.k))
        with torch.cuda.device(self.device):
            for start in range(0, rows.shape[0], step):
                block = rows[start : start + step].to(self.accumulate_dtype).contiguous()
                # The kernel runs on the legacy default stream and reads raw memory.
                torch.cuda.current_stream().synchronize()
                result = self._module(block)
                torch.cuda.default_stream().synchronize()
                out[start : start + step] = result
        return out


class FastJLProjector(Projector):
    """A dense Rademacher projection through the package ``fast_jl``, scaled by 1/sqrt(k).

    Its matrix is its own, so the numbers differ from the PyTorch backend's for every seed. Values are converted to half
    precision (11 bits) before they are summed in float32. Each row is divided by its largest magnitude before and
    multiplied after, so that small gradients do not vanish; entries below 6e-8 of the largest still do.
    """

    backend = "fast_jl"

    def __init__(self, recipe: Recipe) -> None:
        stage = recipe.stage
        if stage.k is None or stage.k % 512:
            raise UsageError(f"{stage} has k={stage.k}, and fast_jl needs a multiple of 512; use backend='torch'")
        if recipe.dtype == torch.float64:
            raise UsageError("fast_jl computes in half precision, and float64 was asked for; use backend='torch'")
        self._package = _import("fast_jl", recipe)
        super().__init__(recipe, stage.k)
        # One positive 31-bit number from the stream's key, so that different streams have different matrices.
        self._seed = recipe.stream.key[0] >> 1
        # The matrix depends on the number of tiles; one chosen by p alone gives the same matrix on every GPU.
        self._tiles = max(1, min(_MAX_TILES, self.p // _TILE_COORDINATES))

    def _project(self, rows: Tensor) -> Tensor:
        out = torch.empty((rows.shape[0], self.k), dtype=torch.float32, device=self.device)
        with torch.cuda.device(self.device):
            for start in range(0, rows.shape[0], 32):
                block = rows[start : start + 32].float()
                largest = block.abs().amax(dim=1, keepdim=True)
                largest.masked_fill_(largest == 0, 1.0)
                block = (block / largest).contiguous()
                size = next(size for size in (8, 16, 32) if block.shape[0] <= size)
                project = getattr(self._package, f"project_rademacher_{size}")
                # As with sjlt: the kernel runs on the legacy default stream.
                torch.cuda.current_stream().synchronize()
                result = project(block, self.k, self._seed, self._tiles)
                torch.cuda.default_stream().synchronize()
                torch.mul(result[: block.shape[0]], largest, out=out[start : start + 32])
        return out.mul_(1.0 / math.sqrt(self.k))


def _import(name: str, recipe: Recipe) -> ModuleType:
    """Imports an optional package, or says how to get it."""
    if recipe.device.type != "cuda":
        raise UsageError(
            f"backend={name!r} needs a CUDA GPU, and the device is {recipe.device}; use backend='torch' or a GPU"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"backend={name!r} is not usable here ({error}); run `make cuda` on a machine with a GPU and nvcc, or use "
            "backend='torch'"
        ) from error
