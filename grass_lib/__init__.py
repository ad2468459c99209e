"""Gradient sparsification and sparse projection for training-data attribution: the reproducible companion to GraSS.

The road is ``experiments -> gradients -> projection -> store -> attribution -> evaluation -> report``; each folder is
one stretch of it. The names below are the ones that notebooks and users call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grass_lib.attribution import (
        TRAK,
        FactGraSS,
        GradientCosine,
        InfluenceFunction,
        LoGra,
        TopK,
        TracIn,
        topk,
    )
    from grass_lib.errors import GrassError, UsageError
    from grass_lib.evaluation import LDSResult, RetrainingBank, lds
    from grass_lib.projection import Mask, Projector, build_projector
    from grass_lib.specs import CompressionSpec
    from grass_lib.store import GradientStore

__version__ = "0.1.0"

# Imported at first use, so that `grass --help` does not wait for torch.
_HOMES = {
    "CompressionSpec": "grass_lib.specs",
    "FactGraSS": "grass_lib.attribution",
    "GradientCosine": "grass_lib.attribution",
    "GradientStore": "grass_lib.store",
    "GrassError": "grass_lib.errors",
    "InfluenceFunction": "grass_lib.attribution",
    "LDSResult": "grass_lib.evaluation",
    "LoGra": "grass_lib.attribution",
    "Mask": "grass_lib.projection",
    "Projector": "grass_lib.projection",
    "RetrainingBank": "grass_lib.evaluation",
    "TRAK": "grass_lib.attribution",
    "TopK": "grass_lib.attribution",
    "TracIn": "grass_lib.attribution",
    "UsageError": "grass_lib.errors",
    "build_projector": "grass_lib.projection",
    "lds": "grass_lib.evaluation",
    "topk": "grass_lib.attribution",
}

__all__ = [
    "TRAK",
    "CompressionSpec",
    "FactGraSS",
    "GradientCosine",
    "GradientStore",
    "GrassError",
    "InfluenceFunction",
    "LDSResult",
    "LoGra",
    "Mask",
    "Projector",
    "RetrainingBank",
    "TopK",
    "TracIn",
    "UsageError",
    "build_projector",
    "lds",
    "topk",
]


def __getattr__(name: str) -> Any:
    """The public name, from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'grass_lib' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
