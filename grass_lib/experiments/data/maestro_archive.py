"""The archive of MIDI files of MAESTRO v2.0.0: in ``GRASS_DATA``, or fetched from its official address."""

from __future__ import annotations

import hashlib
import importlib.util
import urllib.request
from pathlib import Path

from tqdm import tqdm

from grass_lib.errors import DataError
from grass_lib.experiments.data.sources import grass_data
from grass_lib.files import replacing
from grass_lib.project import runs_root

ADDRESS = "https://storage.googleapis.com/magentadata/datasets/maestro/v2.0.0/maestro-v2.0.0-midi.zip"
ARCHIVE = "maestro-v2.0.0-midi.zip"
SHA256 = "ec2cc9d94886c6b376db1eaa2b8ad1ce62ff9f0a28b3744782b13163295dadf3"
BYTES = 59_243_107
"""Of the official archive."""
_CHUNK = 1 << 20
_TIMEOUT = 60


def archive_here() -> Path | None:
    """The archive on this machine; None where there is none."""
    try:
        folder = grass_data()
    except DataError:
        return None
    path = _downloaded() if folder is None else folder / "maestro" / ARCHIVE
    return path if path.is_file() else None


def archive_path(*, progress: bool = True) -> Path:
    """The archive: that of ``GRASS_DATA``, or the official one, fetched once.

    Args:
        progress: Shows a bar while it is fetched.

    Raises:
        DataError: It is missing, cannot be fetched or is damaged.
    """
    if grass_data() is not None:
        path = archive_here()
        if path is None:
            raise DataError(_absent())
        return path
    path = _downloaded()
    if not path.is_file():
        fetch(path, progress=progress)
    found = archive_hash(path)
    if found != SHA256:
        raise DataError(f"{archive_label()} has SHA-256 {found}, expected {SHA256}; delete it to fetch it again")
    return path


def archive_label() -> str:
    """Name of the archive in messages."""
    return f"runs/shared/maestro/{ARCHIVE}" if grass_data() is None else f"GRASS_DATA's maestro/{ARCHIVE}"


def archive_hash(path: Path) -> str:
    """SHA-256 of an archive.

    Raises:
        DataError: It cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{archive_label()} could not be read: {error.strerror or error}; make it readable") from error
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where the fetched archive and the events read from it are kept."""
    return runs_root() / "shared" / "maestro"


def maestro_fingerprint() -> str:
    """A hash of the archive; the official one has the known hash.

    Raises:
        DataError: ``GRASS_DATA`` has no archive, or it cannot be read.
    """
    return SHA256 if grass_data() is None else archive_hash(archive_path())


def maestro_problems() -> list[str]:
    """What keeps the data from being read here, one sentence each; asks nothing of the network."""
    missing = [name for name in ("mido", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        return [f"reading MAESTRO needs {' and '.join(missing)}, not installed here; run `make setup`"]
    try:
        return [_absent()] if grass_data() is not None and archive_here() is None else []
    except DataError as error:
        return [str(error)]


def fetch(
    path: Path, *, address: str = ADDRESS, sha256: str = SHA256, size: int = BYTES, progress: bool = True
) -> None:
    """Downloads the official archive; it appears under its name only when its checksum is right.

    Args:
        path: Where to; its folder is made.
        address: Where from.
        sha256: What the content must be.
        size: Its bytes; nothing beyond is read.
        progress: Shows a bar.

    Raises:
        DataError: It cannot be had, or its content is another one.
    """
    digest = hashlib.sha256()
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(address, timeout=_TIMEOUT) as answer,
            tqdm(total=size, unit="B", unit_scale=True, desc="MAESTRO", disable=not progress) as bar,
            replacing(path, part) as file,
        ):
            left = size
            while left > 0 and (block := answer.read(min(_CHUNK, left))):
                digest.update(block)
                file.write(block)
                left -= len(block)
                bar.update(len(block))
            found = digest.hexdigest()
            if left or answer.read(1) or found != sha256:
                raise DataError(
                    f"{address} gave {size - left:,} bytes or more with SHA-256 {found}; expected {size:,} with "
                    f"{sha256}. Try again, or {_REMEDY}"
                )
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(f"MAESTRO could not be fetched from {address} ({reason}). Try again, or {_REMEDY}") from error


_REMEDY = f"set GRASS_DATA to a folder that has maestro/{ARCHIVE}, or run with scale=embedded"


def _downloaded() -> Path:
    return cache_folder() / ARCHIVE


def _absent() -> str:
    return (
        f"GRASS_DATA has no maestro/{ARCHIVE}; put the archive of MIDI files of MAESTRO v2.0.0 there, or unset "
        "GRASS_DATA to fetch it from its official address"
    )
