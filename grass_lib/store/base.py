"""What stores on the disk and in memory have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import StoreError
from grass_lib.store.basis import StoreBasis
from grass_lib.store.formats import Rows
from grass_lib.store.manifest import Manifest
from grass_lib.store.writer import ShardWriter


class Store(ABC):
    """Rows of compressed per-sample gradients, by shard and layer.

    A shard is a fixed range of sample indices, whatever the order, the workers or the batches that it was computed in.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Keeps the plan.

        Args:
            manifest: The checked plan.
        """
        self.manifest = manifest

    @property
    def layers(self) -> dict[str, int]:
        """Features per layer, ``{name: k_l}``, in file order."""
        return dict(self.manifest.layers)

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return self.manifest.n_samples

    @property
    def shard_size(self) -> int:
        """Samples per shard; the last one may have fewer."""
        return self.manifest.shard_size

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return self.manifest.n_shards

    @property
    def features(self) -> dict[str, int]:
        """Features of the gradients per layer: those of ``layers``, unless rows are coefficients of a basis."""
        return self.manifest.features

    @property
    def basis(self) -> StoreBasis | None:
        """The basis whose coefficients the rows are; None where rows are gradients."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers, which are codes with scales for int8 and fp8."""
        return self.manifest.dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Of rows before they are stored and when they are read: float32 where codes are stored."""
        return self.manifest.row_dtype

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the rows come from, as JSON values."""
        return self.manifest.fingerprint

    @property
    def source(self) -> dict[str, Any] | None:
        """What would compute the rows again; None when nothing is known."""
        return self.manifest.source

    @property
    def provenance(self) -> dict[str, Any] | None:
        """Notes that change nothing, such as versions and the device."""
        return self.manifest.provenance

    @property
    def is_complete(self) -> bool:
        """Whether every shard is finished."""
        return not self.missing()

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes of all finished shards."""

    def shard_rows(self, number: int) -> range:
        """Sample indices of one shard.

        Raises:
            UsageError: There is no such shard.
        """
        return self.manifest.shard_rows(number)

    def missing(self, worker: int = 0, n_workers: int = 1) -> list[int]:
        """Shards of one worker that are not finished: those whose number leaves ``worker`` modulo ``n_workers``.

        Raises:
            UsageError: ``worker`` is not in ``0 ... n_workers - 1``.
        """
        self.manifest.check_worker(worker, n_workers)
        finished = self._finished()
        return [number for number in range(worker, self.n_shards, n_workers) if number not in finished]

    @abstractmethod
    def writer(
        self, *, max_pending: int = 1, worker: int = 0, n_workers: int = 1
    ) -> AbstractContextManager[ShardWriter]:
        """A writer with one background thread, stopped at the end of the block.

        Args:
            max_pending: Shards that may be unwritten when `ShardWriter.submit` returns.
            worker: This worker's number.
            n_workers: Number of workers that write to this store.
        """

    @abstractmethod
    def write(self, number: int, tensors: Mapping[str, Tensor | Rows]) -> None:
        """Writes one shard, in place of one that may be there.

        Args:
            number: The shard.
            tensors: ``{layer: (rows, k_l)}`` in ``row_dtype`` on the CPU, or rows that are encoded already.

        Raises:
            UsageError: Layers, shapes, the dtype or the device differ from the plan.
            StoreError: The shard could not be written.
        """

    @abstractmethod
    def read(self, number: int, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Reads one shard.

        Args:
            number: The shard.
            layers: Names of the layers wanted; None means all.

        Returns:
            ``{layer: (rows, k_l)}`` in ``row_dtype``, in file order.

        Raises:
            UsageError: There is no such shard or layer.
            StoreError: The shard is missing, damaged, or cannot be read.
        """

    def stream(
        self, *, shards: Iterable[int] | None = None, layers: Iterable[str] | None = None, prefetch: int = 4
    ) -> Iterator[tuple[range, str, Tensor]]:
        """Goes over shards and their layers, in order; arguments and errors as in :meth:`stream_rows`.

        Yields:
            Sample indices of the shard, the layer's name, and its rows ``(rows, k_l)`` in ``row_dtype`` on the CPU.
            A tensor is valid until ``prefetch`` further ones have been taken.
        """
        found = self.stream_rows(shards=shards, layers=layers, prefetch=prefetch)
        return ((samples, name, rows.decoded()) for samples, name, rows in found)

    @abstractmethod
    def stream_rows(
        self, *, shards: Iterable[int] | None = None, layers: Iterable[str] | None = None, prefetch: int = 4
    ) -> Iterator[tuple[range, str, Rows]]:
        """Goes over shards and their layers, in order.

        Args:
            shards: Numbers of the shards wanted; None means all.
            layers: Names of the layers wanted; None means all.
            prefetch: How many tensors are read ahead, and how long one stays valid.

        Yields:
            Sample indices of the shard, the layer's name, and its rows ``(rows, k_l)`` as they are stored, on the CPU:
            fewer bytes to move before they are decoded. They are valid until ``prefetch`` further ones have been taken.

        Raises:
            UsageError: There is no such shard or layer, or ``prefetch`` is not positive.
            StoreError: A shard is missing, damaged, or cannot be read.
        """

    @abstractmethod
    def _finished(self) -> set[int]:
        """Numbers of the finished shards."""

    def _chosen_shards(self, shards: Iterable[int] | None) -> list[int]:
        """Numbers of the chosen shards in order, all of which are finished."""
        chosen = range(self.n_shards) if shards is None else sorted(set(shards))
        for number in chosen:
            self.shard_rows(number)
        absent = sorted(set(chosen) - self._finished())
        if absent:
            raise StoreError(
                f"{len(absent)} of {len(chosen)} shards are missing in {self._place}: {shard_list(absent)}; cache "
                "again, then only missing shards are computed"
            )
        return list(chosen)

    @property
    @abstractmethod
    def _place(self) -> str:
        """Where the store is, for messages."""


def shard_list(numbers: list[int]) -> str:
    """Shard numbers for a message, runs of them shortened: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(texts) if len(texts) <= 30 else f"{', '.join(texts[:30])}, ... {texts[-1]}"
