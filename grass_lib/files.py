"""Files that appear whole or not at all: temporary name, flush to the disk, rename, flush of the folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from grass_lib.errors import GrassError, UsageError

# The last one is a limit on the size of files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, temporary: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes the place of ``path`` when the block ends without an exception.

    Args:
        path: Where to; the folder must exist. An existing file is replaced in one step.
        temporary: A name in the same folder that nobody else uses.

    Yields:
        The temporary file, open for writing.

    Raises:
        OSError: The file system refused; the temporary file is removed, as it is after a `GrassError` of the block, and
            what was at ``path`` is untouched unless only the last step, the flush of the folder, failed. Whatever else
            ends the block leaves the temporary file as a kill would, for the next writer to remove.
    """
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except (OSError, GrassError):
        temporary.unlink(missing_ok=True)
        raise


def write_whole(
    path: Path, content: bytes, what: str, *, failure: type[GrassError] = GrassError, then: str = "run the same again"
) -> None:
    """Writes a file, whole or not at all, and explains a refusal.

    Args:
        path: Where to; the folder must exist. An existing file is replaced in one step.
        content: The bytes.
        what: What the file is, for the message.
        failure: The error to raise.
        then: What to do once the cause is mended, for the message.

    Raises:
        GrassError: The file could not be written, as ``failure``; no temporary file is left, and what was there before
            is untouched.
    """
    try:
        with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as file:
            file.write(content)
    except OSError as error:
        cause, remedy = (error.strerror or str(error)), "make the folder writable, or choose another,"
        if error.errno in _FULL:
            cause, remedy = "the disk (or its quota) is full", "free some space"
        raise failure(
            f"{what} {path} ({len(content):,} bytes) could not be written: {cause}; {remedy} and {then}"
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable; without it a power cut may undo what was reported as finished."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_output(path: Path | None, option: str = "--json", *, makes_folder: bool = False) -> None:
    """Refuses a file that could not be written, before the work that fills it.

    Args:
        path: As it was typed; None for no file.
        option: By which it was typed.
        makes_folder: Its folder will be made.

    Raises:
        UsageError: It is a folder, or its folder is not there.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{option} is {str(path)!r}, a folder; expected the name of a file in it")
    if not (makes_folder or path.resolve().parent.is_dir()):
        raise UsageError(f"{option} is {str(path)!r}, whose folder does not exist; make it first")
