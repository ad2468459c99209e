"""The dense sign projection of the package ``fast_jl``, which the paper's tables call fjlt."""

import math
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec, StageSpec

# The package's matrix depends on the number of tiles it cuts the features into; a fixed one keeps it the same on every GPU.
_TILES = 128
_COLUMNS = 512


class FastJL(Projector):
    """``fast_jl.project_rademacher`` divided by ``sqrt(k)``: signs of the package's own generator, not of this library's.

    The package converts its input to half precision; rows are brought to a largest entry of 1 before and scaled back
    after, so that small gradients do not vanish.
    """

    def __init__(self, spec: StageSpec | CompressionSpec, p: int, k: int, *, stream: Stream, **common: object) -> None:
        """Checks that the package can do this."""
        super().__init__(spec, p, k, backend="fast_jl", **common)  # type: ignore[arg-type]
        if self.device.type != "cuda":
            raise UsageError(f"backend='fast_jl' runs on a GPU only; the device is {self.device}. Use backend='torch'.")
        if k % _COLUMNS:
            raise UsageError(f"backend='fast_jl' needs k to be a multiple of {_COLUMNS}; {spec} has {k}.")
        if find_spec("fast_jl") is None:
            raise UsageError("backend='fast_jl' needs the package fast_jl, which is not installed. Run `make cuda`.")
        self._package = import_module("fast_jl")
        self._seed = stream.key[0] >> 1

    def _project(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(dim=1, keepdim=True).to(torch.float32)
        scale = torch.where(largest > 0, largest, torch.ones_like(largest))
        rows = (x.to(torch.float32) / scale).contiguous()
        size = next((size for size in (8, 16) if len(rows) <= size), 32)
        project = getattr(self._package, f"project_rademacher_{size}")
        projected = project(rows, self.k, self._seed, _TILES)[: len(rows)]
        return projected.to(torch.float32).mul_(scale / math.sqrt(self.k))
