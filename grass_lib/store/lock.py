"""One writer per worker of a store's folder."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grass_lib.errors import StoreError

logger = logging.getLogger(__name__)

# A killed holder may take a moment to go.
PATIENCE_SECONDS = 2.0
_CREATE = ".lock-create"
_NAME = re.compile(r"\.lock-\d+of(\d+)")


@contextmanager
def worker_lock(folder: Path, worker: int, n_workers: int) -> Iterator[None]:
    """Holds the right to write one worker's shards; the operating system drops it when its holder ends, however.

    Workers that split the shards in another number would share shards, so those are kept out too.

    Args:
        folder: The store's folder.
        worker: This worker's number.
        n_workers: Number of workers.

    Raises:
        StoreError: Another process, or another writer of this one, writes here.
    """
    with ExitStack() as stack:
        path = folder / f".lock-{worker}of{n_workers}"
        if not stack.enter_context(_held(path, PATIENCE_SECONDS)):
            raise _busy(folder, path, worker, n_workers)
        # The own lock is held first: of two that start at the same moment at least one sees the other.
        for other in sorted(folder.glob(".lock-*of*")):
            match = _NAME.fullmatch(other.name)
            if match and int(match[1]) != n_workers:
                with _held(other, PATIENCE_SECONDS) as free:
                    if not free:
                        raise _busy(folder, other, worker, n_workers)
        yield


@contextmanager
def creation_lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time make a store's manifest; others wait."""
    with _held(folder / _CREATE, float("inf")):
        yield


def remove_creation_lock(folder: Path) -> None:
    """Removes the lock file of a process that was killed just after it had made the manifest."""
    if (folder / _CREATE).exists():
        with creation_lock(folder):
            pass


@contextmanager
def _held(path: Path, patience: float) -> Iterator[bool]:
    """Holds a lock file during the block, and removes it afterwards; yields whether it could be had in time."""
    deadline = time.monotonic() + patience
    while (file := _take(path)) is None:
        if time.monotonic() > deadline:
            yield False
            return
        time.sleep(0.02)
    try:
        yield True
    finally:
        # While it is held, so that nobody else's lock is removed.
        path.unlink(missing_ok=True)
        os.close(file)


def _take(path: Path) -> int | None:
    """Opens and locks a file, or gives None when another one holds it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(
            f"gradient store {path.parent} could not be locked: {error.strerror or error}; make it writable"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        # Some network file systems have no locks; files still appear whole or not at all.
        logger.warning("the gradient store in %s is written without a lock: %s", path.parent.name, error.strerror)
        return file
    try:
        same = path.stat().st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        same = False
    if not same:  # its last holder removed it between opening and locking
        os.close(file)
        return None
    return file


def _busy(folder: Path, path: Path, worker: int, n_workers: int) -> StoreError:
    return StoreError(
        f"another process writes to the gradient store {folder} ({path.name} is locked; this is worker {worker} of "
        f"{n_workers}); wait until it has ended, or give each process another worker number of the same n_workers"
    )
