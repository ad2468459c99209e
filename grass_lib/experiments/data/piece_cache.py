"""Events of pieces kept as parquet, so that MIDI files are read once; a file that does not fit is made again."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grass_lib.errors import DataError
from grass_lib.experiments.data.windows import Piece
from grass_lib.files import replacing

logger = logging.getLogger(__name__)

_FINGERPRINT, _CHECKSUM = b"grass_fingerprint", b"grass_sha256"


def write_pieces(path: Path, fingerprint: str, pieces: Sequence[Piece]) -> None:
    """Keeps pieces; a disk that refuses is only warned of, for the pieces are there.

    Args:
        path: Where to; its folder is made.
        fingerprint: Of everything that decides the events.
        pieces: The pieces.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("keeping events needs pyarrow, not installed here; run `make setup`") from error
    metadata = {_FINGERPRINT: fingerprint.encode(), _CHECKSUM: _checksum(pieces).encode()}
    table = pa.table(
        {
            "name": pa.array([piece.name for piece in pieces], pa.string()),
            "title": pa.array([piece.title for piece in pieces], pa.string()),
            "split": pa.array([piece.split for piece in pieces], pa.string()),
            "events": pa.array([piece.events.astype(np.int16) for piece in pieces], pa.list_(pa.int16())),
        }
    ).replace_schema_metadata(metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.with_name(f".{path.name}.{os.getpid()}.tmp")) as file:
            parquet.write_table(table, file, compression="zstd")
    except OSError as error:
        logger.warning("%s could not be written: %s", path.name, error.strerror or error)


def read_pieces(path: Path, fingerprint: str) -> list[Piece] | None:
    """The pieces of a file; None where it is missing, damaged or of another fingerprint.

    Args:
        path: Of the file.
        fingerprint: What it must have been written with.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError("reading events needs pyarrow, not installed here; run `make setup`") from error
    if not path.is_file():
        return None
    try:
        table = parquet.read_table(path)
        metadata = table.schema.metadata or {}
        columns = [table.column(name).to_pylist() for name in ("name", "title", "split")]
        events = [value.values.to_numpy().astype(np.int64) for value in table.column("events")]
        pieces = [Piece(*row) for row in zip(*columns, events, strict=True)]
        fits = metadata.get(_FINGERPRINT) == fingerprint.encode()
        if fits and metadata.get(_CHECKSUM) == _checksum(pieces).encode():
            return pieces
        reason = "its checksum is wrong" if fits else "it is of another fingerprint"
    except (ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
    logger.warning("%s is made again: %s", path.name, reason)
    return None


def _checksum(pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(repr((piece.name, piece.title, piece.split, len(piece.events))).encode())
        digest.update(np.asarray(piece.events).astype("<i2").tobytes())
    return digest.hexdigest()
