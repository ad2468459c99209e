"""A uniformly random mask."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.devices import usable_device
from grass_lib.rng import Stream


def fit_random(p: int, k: int, *, seed: int = 0, name: str = "", device: torch.device | str = "cpu") -> Tensor:
    """The coordinates that the projector ``random_mask-k`` of the same seed and name keeps.

    Args:
        p: Number of coordinates.
        k: How many to keep.
        seed: The run's seed.
        name: What is projected, as in `build_projector`.
        device: Where to compute.

    Returns:
        int64 ``(k,)``, ascending.
    """
    return Stream(seed, name, "sparsification").distinct(k, p, device=usable_device(device))
