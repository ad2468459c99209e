"""Small JSON files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from grass_lib.errors import GrassError
from grass_lib.files import replacing

_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_full_message(folder: Path) -> str:
    """One sentence for a full disk.

    Args:
        folder: a folder on that disk; only its last two parts are named.
    """
    return (
        f"no space left on the disk that holds {'/'.join(folder.parts[-2:])}; "
        "free some (or set GRASS_RUNS to a folder elsewhere) and run the same command again: finished parts are kept"
    )


def is_disk_full(error: OSError) -> bool:
    """Whether an error means that the disk, or the user's share of it, is full."""
    return error.errno in _FULL


def write_atomic(path: Path, content: bytes) -> str:
    """Writes a file under a temporary name, flushes it to the disk and renames it.

    Args:
        path: where to; the folder must exist. An existing file is replaced in one step.
        content: the bytes.

    Returns:
        SHA-256 of the content in hexadecimal.

    Raises:
        GrassError: the disk is full. The file that was there before is untouched.
        OSError: any other failure of the file system.
    """
    try:
        with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as file:
            file.write(content)
    except OSError as error:
        if is_disk_full(error):
            raise GrassError(disk_full_message(path.parent)) from error
        raise
    return hashlib.sha256(content).hexdigest()


def json_bytes(value: Any) -> bytes:
    """JSON as it is written to disk: UTF-8, indented, one newline at the end, no NaN."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Size in bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
