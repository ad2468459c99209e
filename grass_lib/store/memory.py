"""A gradient store in memory, for when nothing has to outlive the process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.store.base import Store
from grass_lib.store.formats import Rows, encode
from grass_lib.store.manifest import Manifest
from grass_lib.store.writer import ShardWriter


class MemoryStore(Store):
    """Keeps the shards as tensors on the CPU; methods as those of `GradientStore`, without files."""

    def __init__(
        self,
        *,
        layers: Mapping[str, int],
        n_samples: int,
        shard_size: int = 1024,
        dtype: torch.dtype | str = torch.float32,
        fingerprint: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes an empty store; arguments and errors as in `GradientStore.create`."""
        super().__init__(
            Manifest.plan(
                layers=layers,
                n_samples=n_samples,
                shard_size=shard_size,
                dtype=dtype,
                fingerprint=fingerprint or {},
                source=source,
                provenance=provenance,
            )
        )
        self._shards: dict[int, dict[str, Rows]] = {}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(rows.nbytes for shard in self._shards.values() for rows in shard.values())

    def writer(
        self, *, max_pending: int = 1, worker: int = 0, n_workers: int = 1
    ) -> AbstractContextManager[ShardWriter]:
        """As `GradientStore.writer`, without a lock."""
        return ShardWriter(
            self.manifest, self.write, max_pending=max_pending, worker=worker, n_workers=n_workers
        ).running()

    def write(self, number: int, tensors: Mapping[str, Tensor | Rows]) -> None:
        """As `GradientStore.write`; the tensors are copied."""
        self.manifest.check_tensors(number, tensors)
        self._shards[number] = {name: self._copied(tensors[name]) for name in self.manifest.layers}

    def read(self, number: int, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """As `GradientStore.read`; the tensors are the stored ones, not to be changed."""
        names = self.manifest.check_layers(layers)
        shard = self._shards[self._chosen_shards([number])[0]]
        return {name: shard[name].decoded() for name in names}

    def stream_rows(
        self, *, shards: Iterable[int] | None = None, layers: Iterable[str] | None = None, prefetch: int = 4
    ) -> Iterator[tuple[range, str, Rows]]:
        """As `GradientStore.stream_rows`; the tensors are the stored ones, valid as long as the store."""
        if prefetch < 1:
            raise UsageError(f"prefetch={prefetch} of a gradient store's stream; expected at least 1")
        names, numbers = self.manifest.check_layers(layers), self._chosen_shards(shards)
        return ((self.shard_rows(number), name, self._shards[number][name]) for number in numbers for name in names)

    def drop(self, number: int) -> None:
        """As `GradientStore.drop`."""
        self.shard_rows(number)
        self._shards.pop(number, None)

    def _copied(self, given: Tensor | Rows) -> Rows:
        rows = given if isinstance(given, Rows) else encode(given.detach(), self.dtype)
        return Rows(*(tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in rows.tensors()))

    def _finished(self) -> set[int]:
        return set(self._shards)

    @property
    def _place(self) -> str:
        return "the gradient store in memory"
