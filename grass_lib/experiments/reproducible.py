"""Training that repeats itself: deterministic kernels on a GPU, and PyTorch's generators as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# With it, products of matrices repeat themselves; PyTorch reads it at the first of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic kernels on a GPU; they and the state of PyTorch's generators are restored afterwards.

    Args:
        device: Where the training runs.
    """
    cuda = device.type == "cuda"
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, fused = memory.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            # Only warned, flash attention would add its gradients in any order.
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False
            # cuDNN's attention knows no fixed order.
            torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])
            memory.fill_uninitialized_memory = filled
            torch.backends.cuda.enable_cudnn_sdp(fused)
