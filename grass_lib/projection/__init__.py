"""Projections ``R^p -> R^k``: one module per family, built from a spec by `build_projector`."""

from grass_lib.projection.base import Projector
from grass_lib.projection.given import GivenProjector
from grass_lib.projection.mask_file import Mask
from grass_lib.projection.registry import BACKENDS, build_projector

__all__ = ["BACKENDS", "GivenProjector", "Mask", "Projector", "build_projector"]
