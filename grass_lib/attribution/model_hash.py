"""The hash of a model's weights: which model a store's rows come from."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from grass_lib.ranks import is_distributed

PIECE = 2**26
"""Bytes that one thread hashes at a time, and at most copies from a GPU."""
_THREADS = 8


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers in the order of its state dict.

    For each: name, shape and type, then the SHA-256 of every 64 MiB of its bytes. Pieces let several threads hash, and
    copy from a GPU, at a time: one thread alone takes half a minute for 8 billion weights.

    Args:
        model: Its weights may be sharded over ranks; then all ranks call this together.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    parts: list[tuple[str, list[Future[bytes]]]] = []
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                continue
            sharded = is_distributed(value)
            whole: Tensor = cast(Any, value).full_tensor() if sharded else value
            pieces = whole.detach().contiguous().view(-1).view(torch.uint8).split(PIECE)
            parts.append((f"{name} {tuple(whole.shape)} {whole.dtype}\n", [pool.submit(_sha256, p) for p in pieces]))
            if sharded:  # one gathered tensor at a time is in memory
                for future in parts[-1][1]:
                    future.result()
        for head, futures in parts:
            digest.update(head.encode())
            for future in futures:
                digest.update(future.result())
    return digest.hexdigest()


def _sha256(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy().data).digest()
