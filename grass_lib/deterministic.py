"""Kernels of a GPU that give the same bits every time."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# With it, products of matrices repeat themselves; PyTorch reads it at the first of a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
logger = logging.getLogger(__name__)


@contextmanager
def deterministic_kernels(device: torch.device, *, strict: bool = True) -> Iterator[None]:
    """Asks for deterministic kernels on a GPU, in eager and in compiled code, and restores what was asked for before.

    Attention is the reason for ``strict``: PyTorch adds its gradients in any order where it would only warn, and the
    fused attention of cuDNN knows no order at all and is switched off.

    Args:
        device: Where the work is done; nothing is changed on a CPU.
        strict: Operations without a deterministic kernel raise RuntimeError; otherwise they run as they are.
    """
    if device.type != "cuda":
        yield
        return
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, fused = memory.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # cuBLAS asks for a setting that matters where several streams share one workspace; here each has its own.
        warnings.filterwarnings("ignore", message=".*(?:CUBLAS_WORKSPACE_CONFIG|deterministic).*")
        stack.callback(torch.use_deterministic_algorithms, modes[0], warn_only=modes[1])
        stack.callback(setattr, memory, "fill_uninitialized_memory", filled)
        stack.callback(torch.backends.cuda.enable_cudnn_sdp, fused)
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        memory.fill_uninitialized_memory = False
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield


def is_deterministic(device: torch.device, step: Callable[[], object]) -> bool:
    """Whether a step runs with strictly deterministic kernels; where it does not, a warning says why.

    Args:
        device: Where it runs.
        step: Is run once.

    Raises:
        RuntimeError: The step fails for another reason.
    """
    try:
        with deterministic_kernels(device):
            step()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        logger.warning("two runs may differ in their last bits: %s", str(error).splitlines()[0])
        return False
    return True
