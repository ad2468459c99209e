"""Linear maps from gradients of length p to vectors of length k, one file per family."""

from grass_lib.projection.base import Projector
from grass_lib.projection.mask_file import Mask
from grass_lib.projection.registry import BACKENDS, build_projector

__all__ = ["BACKENDS", "Mask", "Projector", "build_projector"]
