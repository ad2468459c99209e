"""Reading shards ahead in a background thread, into buffers that are used again and again."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grass_lib.store.formats import Rows
from grass_lib.store.manifest import SCALES, Manifest
from grass_lib.store.shards import data_path, fill, open_shard, raw_bytes

_AHEAD_BYTES = 256 << 20


@dataclass(frozen=True)
class _Filled:
    number: int
    name: str
    shape: tuple[int, int]
    size: int
    buffer: Tensor
    scales: Tensor | None


def stream_shards(
    folder: Path, manifest: Manifest, shards: Sequence[int], layers: Sequence[str], prefetch: int
) -> Iterator[tuple[range, str, Rows]]:
    """Goes over finished shards; arguments, items and errors as in `Store.stream_rows`.

    Holds ``prefetch`` tensors that are still valid and reads as many ahead, but no more than 256 MB of them (and at
    least one). The thread ends with the generator, however that ends.
    """
    largest = max((manifest.layers[name] for name in layers), default=0)
    size = largest * min(manifest.shard_size, manifest.n_samples) * manifest.dtype.itemsize
    ahead = max(1, min(prefetch, _AHEAD_BYTES // max(size, 1)))
    reader = _Reader(
        folder, manifest, shards, layers, buffer_bytes=size, n_buffers=min(prefetch + ahead, len(shards) * len(layers))
    )
    reader.start()
    given: list[Tensor] = []
    try:
        while True:
            if len(given) == prefetch:
                reader.free.put(given.pop(0))
            item = reader.filled.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            given.append(item.buffer)
            rows = Rows(item.buffer[: item.size].view(manifest.dtype).view(item.shape), item.scales)
            yield manifest.shard_rows(item.number), item.name, rows
            del item, rows
    finally:
        reader.stop()


class _Reader(threading.Thread):
    """Fills free buffers in file order until the shards end or it is stopped.

    The number of buffers bounds what it holds, so that handing over a filled one never waits.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shards: Sequence[int],
        layers: Sequence[str],
        *,
        buffer_bytes: int,
        n_buffers: int,
    ) -> None:
        super().__init__(name="shard-reader", daemon=True)
        self._folder, self._manifest = folder, manifest
        self._shards, self._layers = list(shards), list(layers)
        self._buffer_bytes = buffer_bytes
        self._stopped = threading.Event()
        self.free: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        self.filled: queue.SimpleQueue[_Filled | BaseException | None] = queue.SimpleQueue()
        for _ in range(n_buffers):
            self.free.put(torch.empty(buffer_bytes, dtype=torch.uint8))

    def stop(self) -> None:
        """Ends the thread and waits for it."""
        self._stopped.set()
        self.free.put(None)
        self.join()

    def run(self) -> None:
        """Reads; an error is handed over in place of the next tensor."""
        try:
            for number in self._shards:
                if not self._read(number):
                    return
        except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread
            self.filled.put(error)
        else:
            self.filled.put(None)

    def _read(self, number: int) -> bool:
        """Reads one shard; False when it was stopped."""
        path = data_path(self._folder, number)
        file, parts = open_shard(self._folder, self._manifest, number)
        with file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            # They are few, and come first in the file.
            scales = {name: torch.empty(0) for name in self._layers if name + SCALES in parts}
            for name in scales:
                part = parts[name + SCALES]
                scales[name] = torch.empty(part.shape, dtype=part.dtype)
                fill(file, path, part, raw_bytes(scales[name]))
            for name in self._layers:
                buffer = self.free.get()
                if buffer is None or self._stopped.is_set():
                    return False
                part = parts[name]
                fill(file, path, part, raw_bytes(buffer))
                self.filled.put(_Filled(number, name, part.shape, part.size, buffer, scales.get(name)))
        return True
