"""Chorales of J. S. Bach that come with a pip package, as windows of events; the package is never imported."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from grass_lib.errors import DataError
from grass_lib.experiments.data.events import PITCH, encode
from grass_lib.experiments.data.musicxml import read_mxl
from grass_lib.experiments.data.windows import EventWindows, Piece, cut, event_windows, round_robin
from grass_lib.rng import Stream

PACKAGE = "music21"
LICENCE = "J. S. Bach, public domain"
_FOLDER = "music21/corpus/bach"
# Without the variants of a chorale (-inst, -sc, -lz).
_NAME = re.compile(r"bwv(\d+(?:\.\d+)?[a-z]?)\.mxl")
# Of the names and contents of the 381 files.
_SHA256 = "e01826b194a725f6b3ac7bc12021870cf414bd4b68e9551a554ba47fca1a1b7c"
_QUERY_SHARE = 0.1
_TWIN_NOTES = 40


def load_chorales(*, length: int, n_train: int, n_query: int) -> EventWindows:
    """Windows of 381 chorales, each as written, four voices at once and at its tempo.

    A tenth of the chorales is kept for the queries, always the same ones; chorales that begin alike are on one side.
    Training windows are drawn at random from all of the other chorales, always the same ones.

    Args:
        length: Events in a window.
        n_train: Training windows.
        n_query: Query windows.

    Raises:
        DataError: The package is missing or has other files, or the chorales give fewer windows.
    """
    pieces = chorales()
    every = [window for piece in pieces if piece.split == "train" for window in cut(piece, length)]
    if len(every) < n_train:
        raise DataError(
            f"the chorales give {len(every):,} training windows of {length} events; expected {n_train:,} or more. Use "
            "shorter or fewer windows"
        )
    chosen = Stream(0, "chorales", "windows").distinct(n_train, len(every)).tolist()
    return event_windows(
        [every[index] for index in chosen],
        round_robin((piece for piece in pieces if piece.split == "test"), length, n_query),
        source=f"{PACKAGE}: {len(pieces)} chorales of J. S. Bach, notes as written, not performed",
        licence=LICENCE,
        kind="embedded",
        rows=len(pieces),
    )


def chorales() -> list[Piece]:
    """All chorales in the order of their files' names, with their split.

    Raises:
        DataError: The package is missing or has other files.
    """
    notes = {name: read_mxl(content, name) for name, content in _files().items()}
    groups = twins(list(notes.values()))
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    order = Stream(0, "chorales", "split").permutation(len(number))
    held_out = set(order[: round(_QUERY_SHARE * len(number))].tolist())
    return [
        Piece(name, _title(name), "test" if number[group] in held_out else "train", encode(found))
        for (name, found), group in zip(notes.items(), groups, strict=True)
    ]


def twins(pieces: Sequence[np.ndarray]) -> list[int]:
    """Which pieces begin alike: their first 40 notes are the same, at another pitch or speed perhaps.

    Args:
        pieces: Notes ``(n, 4)`` of each piece.

    Returns:
        For each piece the number of the first one that begins like it, which is its own where there is no other.
    """
    seen: dict[bytes, int] = {}
    found = []
    for index, notes in enumerate(pieces):
        pitches = notes[:_TWIN_NOTES, PITCH]
        found.append(seen.setdefault((pitches - pitches[0]).tobytes(), index))
    return found


def chorales_fingerprint() -> str:
    """A hash of the package's files.

    Raises:
        DataError: As in `load_chorales`.
    """
    return _hash(_files())


def _files() -> dict[str, bytes]:
    remedy = f"install it with `pip install {PACKAGE}`, or run `make setup`"
    try:
        folder = Path(str(metadata.distribution(PACKAGE).locate_file(_FOLDER)))
        paths = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
        files = {path.name: path.read_bytes() for path in paths}
    except (metadata.PackageNotFoundError, OSError) as error:
        raise DataError(
            f"the chorales in {_FOLDER} of the package {PACKAGE} were not found ({type(error).__name__}); {remedy}"
        ) from error
    found = _hash(files)
    if found != _SHA256:
        raise DataError(
            f"the {len(files)} chorales in {_FOLDER} of the package {PACKAGE} have SHA-256 {found}, expected "
            f"{_SHA256}; install the version that requirements.txt names"
        )
    return files


def _hash(files: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _title(name: str) -> str:
    found = _NAME.fullmatch(name)
    return f"J. S. Bach: chorale BWV {found[1] if found else name}"
