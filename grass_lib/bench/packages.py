"""The packages ``sjlt`` and ``fast_jl`` called as they are: no check, scaling or synchronisation of ours is timed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from grass_lib.bench.cases import Case
from grass_lib.errors import UsageError
from grass_lib.projection.sjlt import sjlt_table
from grass_lib.rng import Stream
from grass_lib.specs import StageSpec

PACKAGES = ("sjlt", "fast_jl")
_BLOCK_ROWS = (8, 16, 32)  # variants of fast_jl, chosen by the batch as in its documentation


def package_call(case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The bare kernel of a package for a case.

    Raises:
        UsageError: The package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            package = importlib.import_module(case.backend)
    except ImportError as error:
        raise UsageError(f"the package {case.backend} is not installed ({error}); run `make cuda`") from error
    if case.backend == "fast_jl":
        size = next((size for size in _BLOCK_ROWS if case.batch <= size), _BLOCK_ROWS[-1])
        project = getattr(package, f"project_rademacher_{size}")
        tiles = torch.cuda.get_device_properties(device).multi_processor_count
        # Unscaled: the package leaves the factor 1/sqrt(k) to its caller.
        return lambda x: project(x, case.k, 0, tiles)
    nonzeros = StageSpec.parse(case.spec).param or 1
    module = package.SJLTProjection(case.p, case.k, c=nonzeros, device=device)
    destinations, signs = sjlt_table(Stream(0, "", "projection"), case.p, case.k, nonzeros, device)
    module.rand_indices.copy_(destinations)
    module.rand_signs.copy_(signs)
    return module
