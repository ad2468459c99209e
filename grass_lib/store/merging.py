"""Carrying the shards of several stores into one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grass_lib.errors import StoreError
from grass_lib.files import replacing, sync_folder
from grass_lib.store.base import shard_list
from grass_lib.store.manifest import Manifest
from grass_lib.store.shards import BLOCK, data_path, explained, note_path, remove_note, temporary_path, write_note


@dataclass(frozen=True)
class MergePlan:
    """Where each shard of a merged store comes from.

    Attributes:
        origins: Folder by shard.
    """

    origins: Mapping[int, Path]

    def carry_out(self, destination: Path, present: Iterable[int]) -> None:
        """Links or copies the shards that the destination has not.

        Args:
            destination: The folder; its lock is held.
            present: Shards that it has.

        Raises:
            StoreError: A shard differs from the one that is there, is damaged, or could not be written.
        """
        there = set(present)
        for number, origin in self.origins.items():
            note = _read_note(origin, number)
            if number not in there:
                remove_note(destination, number)
                _carry(data_path(origin, number), data_path(destination, number), note)
                write_note(destination, number, note)
            elif _read_note(destination, number) != note:
                raise _conflict(number, origin, destination)


def merge_stores(finished: Mapping[Path, set[int]], manifest: Manifest, allow_missing: bool) -> MergePlan:
    """Chooses a store for each shard.

    Args:
        finished: Finished shards by folder.
        manifest: The plan that all of them share.
        allow_missing: Whether shards may be in none of them.

    Raises:
        StoreError: Two stores have different versions of a shard, or a shard is in none.
    """
    origins: dict[int, Path] = {}
    for number in range(manifest.n_shards):
        for folder in (folder for folder, numbers in finished.items() if number in numbers):
            origin = origins.setdefault(number, folder)
            if origin != folder and _read_note(origin, number) != _read_note(folder, number):
                raise _conflict(number, origin, folder)
    absent = [number for number in range(manifest.n_shards) if number not in origins]
    if absent and not allow_missing:
        raise StoreError(
            f"{len(absent)} of {manifest.n_shards} shards are missing in "
            f"{'the gradient store' if len(finished) == 1 else f'all {len(finished)} gradient stores'}: "
            f"{shard_list(absent)}; compute them first (in Python, allow_missing=True puts together what there is)"
        )
    return MergePlan(origins)


def _read_note(folder: Path, number: int) -> bytes:
    try:
        return note_path(folder, number).read_bytes()
    except OSError as error:
        raise StoreError(f"{note_path(folder, number)} could not be read: {error.strerror or error}") from error


def _conflict(number: int, first: Path, second: Path) -> StoreError:
    notes = [f"{note_path(folder, number)} says {_checksum(_read_note(folder, number))}" for folder in (first, second)]
    return StoreError(f"shard {number} differs between gradient stores: {'; '.join(notes)}; verify both, drop one")


def _checksum(note: bytes) -> str:
    try:
        return f"SHA-256 {json.loads(note)['sha256']}"
    except (ValueError, KeyError, TypeError):
        return "no SHA-256"


def _carry(source: Path, target: Path, note: bytes) -> None:
    """Links a file, or copies it where a link is impossible; a copy is compared with its checksum."""
    size = source.stat().st_size
    temporary = temporary_path(target)
    with explained(target, size):
        try:
            os.link(source, temporary)
        except OSError:
            _copy(source, target, note)
            return
        # Renaming one of two names of one file onto the other would do nothing.
        target.unlink(missing_ok=True)
        temporary.replace(target)
        sync_folder(target.parent)


def _copy(source: Path, target: Path, note: bytes) -> None:
    digest = hashlib.sha256()
    with source.open("rb") as reading, replacing(target, temporary_path(target)) as file:
        while block := reading.read(BLOCK):
            digest.update(block)
            file.write(block)
        if _checksum(note) != f"SHA-256 {digest.hexdigest()}":
            raise StoreError(
                f"{source} is damaged: its SHA-256 is {digest.hexdigest()}, its note says {_checksum(note)}; drop the "
                "shard there and compute it again"
            )
