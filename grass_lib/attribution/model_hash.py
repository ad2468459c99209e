"""The hash of a model's weights: which model a store's rows come from."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn

from grass_lib.ranks import is_distributed

PIECE = 2**26
"""Bytes that have a hash of their own."""
STAGE = 2**24
"""Bytes of page-locked memory through which each thread copies from a GPU."""
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
    hasher = _Hasher()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                continue
            sharded = is_distributed(value)
            whole: Tensor = cast(Any, value).full_tensor() if sharded else value
            pieces = whole.detach().contiguous().view(-1).view(torch.uint8).split(PIECE)
            if whole.is_cuda:  # threads copy on streams of their own
                torch.cuda.current_stream(whole.device).synchronize()
            parts.append((f"{name} {tuple(whole.shape)} {whole.dtype}\n", [pool.submit(hasher, p) for p in pieces]))
            if sharded:  # one gathered tensor at a time is in memory
                for future in parts[-1][1]:
                    future.result()
        for head, futures in parts:
            digest.update(head.encode())
            for future in futures:
                digest.update(future.result())
    return digest.hexdigest()


class _Hasher:
    """SHA-256 of a piece; each thread has a stream and page-locked memory for what comes from a GPU."""

    def __init__(self) -> None:
        self._own = threading.local()

    def __call__(self, piece: Tensor) -> bytes:
        digest = hashlib.sha256()
        for part in self._staged(piece) if piece.is_cuda else [piece.cpu()]:
            digest.update(part.numpy().data)
        return digest.digest()

    def _staged(self, piece: Tensor) -> Iterator[Tensor]:
        own = self._own
        if not hasattr(own, "memory"):
            own.memory, own.streams = torch.empty(STAGE, dtype=torch.uint8, pin_memory=True), {}
        if piece.device not in own.streams:
            own.streams[piece.device] = torch.cuda.Stream(piece.device)
        stream = own.streams[piece.device]
        for part in piece.split(STAGE):
            here = own.memory[: len(part)]
            with torch.cuda.stream(stream):
                here.copy_(part, non_blocking=True)
            stream.synchronize()
            yield here
