"""The gradient store on the disk.

::

    manifest.json              plan, fingerprint, source; written first
    shard_00000.safetensors    one tensor per layer, in the layers' order; for int8 and fp8 their scales before them
    basis.safetensors          only where rows are coefficients of a basis; written before the manifest
    shard_00000.json           bytes, rows, SHA-256; written last, its presence means that the shard is finished

Every file appears whole or not at all, so that a run killed at any moment goes on at the first missing shard.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.errors import NoStoreError, StoreError, UsageError
from grass_lib.files import replacing
from grass_lib.store.base import Store
from grass_lib.store.basis import BASIS, StoreBasis, read_basis, write_basis
from grass_lib.store.formats import Rows, empty_rows
from grass_lib.store.lock import creation_lock, remove_creation_lock, worker_lock
from grass_lib.store.manifest import SCALES, Manifest
from grass_lib.store.merging import merge_stores
from grass_lib.store.place import store_folder
from grass_lib.store.reader import stream_shards
from grass_lib.store.shards import (
    Problem,
    check_shard,
    data_path,
    explained,
    fill,
    note_path,
    open_shard,
    raw_bytes,
    remove_note,
    temporary_path,
    write_shard,
)
from grass_lib.store.writer import ShardWriter

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_SHARD = re.compile(r"shard_(\d{5,})\.(safetensors|json)")
_TEMPORARY = re.compile(r"\.shard_(\d{5,})\.(?:safetensors|json)\.tmp")


class GradientStore(Store):
    """Compressed per-sample gradients of a training set in a folder.

    Attributes:
        path: The folder.
        manifest: Its plan.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """For `create` and `open`, which check the folder.

        Args:
            path: The folder.
            manifest: Its plan.
        """
        super().__init__(manifest)
        self.path = path

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        layers: Mapping[str, int],
        n_samples: int,
        shard_size: int = 1024,
        dtype: torch.dtype | str = torch.float32,
        fingerprint: Mapping[str, Any],
        source: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        low_rank: Mapping[str, Any] | None = None,
    ) -> GradientStore:
        """Makes a store, or opens the one that is there, whose source and provenance then stay.

        Args:
            path: The folder; made where it is missing.
            layers: Features per layer, ``{name: k_l}``.
            n_samples: Number of samples.
            shard_size: Samples per shard.
            dtype: Of the stored numbers: float32, bfloat16, float16, int8 or fp8, as a name or a type of PyTorch's.
            fingerprint: What the rows come from (hashes of model and data, specs, seed, loss): JSON values.
            source: What would compute the rows again; not part of the fingerprint.
            provenance: Notes that change nothing; not part of the fingerprint.
            low_rank: Where rows are coefficients of the basis in the folder, see `Manifest`.

        Raises:
            UsageError: An argument is wrong.
            StoreError: The folder holds a store of another fingerprint, each differing field of which is named with
                both values; or it is damaged, or cannot be written.
        """
        manifest = Manifest.plan(
            layers=layers,
            n_samples=n_samples,
            shard_size=shard_size,
            dtype=dtype,
            fingerprint=fingerprint,
            source=source,
            provenance=provenance,
            low_rank=low_rank,
        )
        folder = store_folder(path, "path")
        return cls(folder, _placed(folder, manifest))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GradientStore:
        """Opens a store.

        Raises:
            NoStoreError: There is none.
            StoreError: Its manifest is damaged or of another format.
        """
        folder = Path(path)
        return cls(folder, _read_manifest(folder))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the manifest, of the basis where there is one, and of all finished shards."""
        files = [path(self.path, number) for number in self._finished() for path in (data_path, note_path)]
        files += [self.path / BASIS] if self.manifest.low_rank else []
        return sum(file.stat().st_size for file in [self.path / MANIFEST, *files])

    @cached_property
    def basis(self) -> StoreBasis | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The basis whose coefficients the rows are, read at first use; None where rows are gradients.

        Raises:
            StoreError: Its file is missing or damaged.
        """
        low_rank = self.manifest.low_rank
        return StoreBasis.from_bytes(read_basis(self.path, low_rank["sha256"])) if low_rank else None

    @contextmanager
    def writer(self, *, max_pending: int = 1, worker: int = 0, n_workers: int = 1) -> Iterator[ShardWriter]:
        """A writer with one background thread; it holds the lock of a worker's shards during the block.

        What killed writers of these shards left unfinished is removed.

        Args:
            max_pending: Shards that may be unwritten when `ShardWriter.submit` returns.
            worker: This worker's number: it writes the shards that leave ``worker`` modulo ``n_workers``.
            n_workers: Number of workers that write to this folder.

        Raises:
            UsageError: A number is out of range.
            StoreError: Another process writes these shards, or a shard could not be written.
        """
        writer = ShardWriter(self.manifest, self._write, max_pending=max_pending, worker=worker, n_workers=n_workers)
        with worker_lock(self.path, worker, n_workers):
            self._clean(worker, n_workers)
            with writer.running():
                yield writer

    def write(self, number: int, tensors: Mapping[str, Tensor | Rows]) -> None:
        """Writes one shard at once, in place of one that may be there; no other process may write here meanwhile."""
        self.manifest.check_tensors(number, tensors)
        with worker_lock(self.path, 0, 1):
            self._write(number, tensors)

    def read(self, number: int, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Reads one shard; compared with its header and size, not with its checksum."""
        names, result = self.manifest.check_layers(layers), {}
        self.shard_rows(number)
        file, parts = open_shard(self.path, self.manifest, number)
        with file:
            for name in names:
                rows = empty_rows(*parts[name].shape, self.dtype)
                for key, tensor in zip((name, name + SCALES), rows.tensors(), strict=False):
                    fill(file, data_path(self.path, number), parts[key], raw_bytes(tensor))
                result[name] = rows.decoded()
        return result

    def stream_rows(
        self, *, shards: Iterable[int] | None = None, layers: Iterable[str] | None = None, prefetch: int = 4
    ) -> Iterator[tuple[range, str, Rows]]:
        """Goes over shards in order, read ahead by a thread; rows are valid until ``prefetch`` more were taken."""
        if prefetch < 1:
            raise UsageError(f"prefetch={prefetch} of a gradient store's stream; expected at least 1")
        names, numbers = self.manifest.check_layers(layers), self._chosen_shards(shards)
        return stream_shards(self.path, self.manifest, numbers, names, prefetch)

    def verify(self, progress: bool = True) -> list[Problem]:
        """Reads every shard and compares it with its checksum.

        Args:
            progress: Whether to show a bar.

        Returns:
            What is wrong, by shard; empty when all is well.

        Raises:
            StoreError: The basis of a low-rank store is missing or damaged.
        """
        if self.manifest.low_rank:
            read_basis(self.path, self.manifest.low_rank["sha256"])
        numbers = tqdm(range(self.n_shards), desc="verify", unit="shard", disable=not progress, leave=False)
        found = (check_shard(self.path, self.manifest, number) for number in numbers)
        return [problem for problem in found if problem is not None]

    def drop(self, number: int) -> None:
        """Forgets a shard, so that it counts as missing; nothing happens where it is missing.

        Raises:
            UsageError: There is no such shard.
            StoreError: Its files could not be removed.
        """
        self.shard_rows(number)
        try:
            remove_note(self.path, number)
            data_path(self.path, number).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"shard {number} of the gradient store {self.path} could not be removed: {error.strerror or error}; "
                "make the folder writable"
            ) from error

    @staticmethod
    def merge(
        sources: Sequence[GradientStore | str | os.PathLike[str]],
        destination: str | os.PathLike[str],
        *,
        allow_missing: bool = False,
    ) -> GradientStore:
        """Puts the shards of several stores of one fingerprint into one folder, by hard links where possible.

        Args:
            sources: The stores, each with some of the shards. Source and provenance are those of the first.
            destination: The folder; shards that it has stay, so that a merge that was killed goes on.
            allow_missing: Whether the result may lack shards.

        Raises:
            UsageError: There are no sources.
            StoreError: Fingerprints differ, a shard differs between stores, shards are missing, or a file could not be
                written.
        """
        stores = [each if isinstance(each, GradientStore) else GradientStore.open(each) for each in sources]
        if not stores:
            raise UsageError("merge without sources; expected one gradient store or more")
        for store in stores:
            stores[0].manifest.refuse_other(store.manifest, store.path)
        folder = Path(destination)
        if (folder / MANIFEST).exists():
            stores[0].manifest.refuse_other(_read_manifest(folder), folder)
        # Checked before anything is written, and again by the copy itself where the destination has shards.
        plan = merge_stores({store.path: store._finished() for store in stores}, stores[0].manifest, allow_missing)
        if stores[0].manifest.low_rank and not (folder / BASIS).exists():
            content = read_basis(stores[0].path, stores[0].manifest.low_rank["sha256"])
            with explained(folder / BASIS, len(content)):
                folder.mkdir(parents=True, exist_ok=True)
                write_basis(folder, content)
        result = GradientStore(folder, _placed(folder, stores[0].manifest))
        with worker_lock(folder, 0, 1):
            result._clean(0, 1)
            plan.carry_out(folder, result._finished())
        return result

    def _write(self, number: int, tensors: Mapping[str, Tensor | Rows]) -> None:
        write_shard(self.path, self.manifest, number, tensors)

    def _clean(self, worker: int, n_workers: int) -> None:
        """Removes temporary files of one worker's shards; its lock is held."""
        for path in self.path.glob(".shard_*.tmp"):
            match = _TEMPORARY.fullmatch(path.name)
            if match and int(match[1]) % n_workers == worker:
                logger.info("removing %s, left by a run that was killed", path.name)
                path.unlink(missing_ok=True)
        remove_creation_lock(self.path)

    def _finished(self) -> set[int]:
        try:
            names = [path.name for path in self.path.iterdir()]
        except OSError as error:
            raise StoreError(f"gradient store {self.path} could not be read: {error.strerror or error}") from error
        found: dict[str, set[int]] = {"json": set(), "safetensors": set()}
        for match in filter(None, map(_SHARD.fullmatch, names)):
            found[match[2]].add(int(match[1]))
        return {number for number in found["json"] & found["safetensors"] if number < self.n_shards}

    @property
    def _place(self) -> str:
        return f"the gradient store {self.path}"


def _placed(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest of a folder, written where there is none.

    Raises:
        StoreError: There is another one, or it could not be written.
    """
    path = folder / MANIFEST
    content = manifest.to_bytes()
    with explained(path, len(content)):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with creation_lock(folder):
            if not path.exists():
                with explained(path, len(content)), replacing(path, temporary_path(path)) as file:
                    file.write(content)
    found = _read_manifest(folder)
    manifest.refuse_other(found, folder)
    return found


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoStoreError(
            f"there is no gradient store in {folder}: it has no {MANIFEST}; check the path, or cache first"
        ) from error
    except OSError as error:
        raise StoreError(f"{path} could not be read: {error.strerror or error}; make it readable") from error
    return Manifest.from_bytes(content, path)
