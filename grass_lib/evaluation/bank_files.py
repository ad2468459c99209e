"""Files of a retraining bank: each appears whole or not at all, is checked on reading, and is never pickled.

A group's JSON file is written last and holds the checksums of all others, so that a group counts as finished only when
everything it consists of is on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from grass_lib import files
from grass_lib.errors import BankError

LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)


@contextmanager
def bank_lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time train a bank; another one waits, and then finds the groups finished.

    The operating system drops the lock when its holder ends, however it ends.

    Args:
        folder: The bank's folder; it must exist.

    Raises:
        BankError: The lock file could not be opened.
    """
    try:
        file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise BankError(
            f"bank folder {folder} could not be locked: {error.strerror or error}; make it writable"
        ) from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process trains the bank in %s; waiting until it has ended", folder.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks; files still appear whole or not at all.
            logger.warning("the bank in %s is used without a lock: %s", folder.name, error.strerror)
        yield
    finally:
        os.close(file)


def write_whole(path: Path, content: bytes) -> str:
    """Writes a file under a temporary name, flushes it to the disk and renames it.

    Args:
        path: Where to; the folder must exist.
        content: The bytes.

    Returns:
        SHA-256 of the content in hexadecimal.

    Raises:
        BankError: The file could not be written; what was there before is untouched.
    """
    # Left over from a run that was killed while it wrote this very file; the lock keeps others out.
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(OSError):
            stale.unlink()
    then = "run the same command again, finished groups are kept"
    files.write_whole(path, content, "bank file", failure=BankError, then=then)
    return hashlib.sha256(content).hexdigest()


def read_checked(path: Path, expected: str, group: str) -> bytes:
    """Reads a file and compares its checksum.

    Args:
        path: The file, which exists.
        expected: SHA-256 in hexadecimal.
        group: What would be trained again, for the message.

    Raises:
        BankError: The file is damaged or cannot be read.
    """
    content = _read(path)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise BankError(
            f"bank file {path} is damaged: its SHA-256 is {found}, expected {expected}; delete this file and run "
            f"again, then only {group} is trained again"
        )
    return content


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes tensors as safetensors; arguments, result and errors as in `write_whole`."""
    return write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_tensors(path: Path, expected: str, group: str) -> dict[str, Tensor]:
    """Reads tensors after checking the file; arguments and errors as in `read_checked`."""
    return load(read_checked(path, expected, group))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes one JSON object; errors as in `write_whole`."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Reads one JSON object.

    Args:
        path: The file, which exists.
        remedy: What to do about a damaged file, for the message.

    Raises:
        BankError: The file is no JSON object or cannot be read.
    """
    try:
        value = json.loads(_read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BankError(f"bank file {path} is damaged: {error}; expected JSON; {remedy}") from error
    if not isinstance(value, dict):
        raise BankError(f"bank file {path} holds a {type(value).__name__}; expected a JSON object; {remedy}")
    return value


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BankError(
            f"bank file {path} could not be read: {error.strerror or error}; make it readable, or delete it to train "
            "it again"
        ) from error
