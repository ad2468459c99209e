"""Training that repeats itself: deterministic kernels on a GPU, and PyTorch's generators as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grass_lib.deterministic import deterministic_kernels


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on a GPU; they and the state of PyTorch's generators are restored afterwards.

    Args:
        device: Where the training runs.
    """
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, deterministic_kernels(device):
        yield
