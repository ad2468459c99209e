"""MAESTRO v2.0.0 (Hawthorne et al. 2019): piano performances as windows of 256 events, from its archive of MIDI files.

Training windows are the first 5,000 of the official training split, its performances in the order of their paths.
Queries are 178 windows of the official test split, as many as it has performances: the first window of every
performance in that order, then the second of every one, and so on until there are enough.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import logging
import re
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from grass_lib.errors import DataError
from grass_lib.experiments.data.archive import SafeArchive, open_archive
from grass_lib.experiments.data.events import encode
from grass_lib.experiments.data.midi import read_midi
from grass_lib.experiments.data.piece_cache import read_pieces, write_pieces
from grass_lib.experiments.data.sources import grass_data
from grass_lib.experiments.data.windows import EventWindows, Piece, event_windows, first_windows, round_robin
from grass_lib.files import replacing
from grass_lib.project import runs_root

logger = logging.getLogger(__name__)

ADDRESS = "https://storage.googleapis.com/magentadata/datasets/maestro/v2.0.0/maestro-v2.0.0-midi.zip"
ARCHIVE = "maestro-v2.0.0-midi.zip"
SHA256 = "ec2cc9d94886c6b376db1eaa2b8ad1ce62ff9f0a28b3744782b13163295dadf3"
BYTES = 59_243_107
"""Of the official archive."""
PERFORMANCES = 1282
LENGTH, N_TRAIN, N_QUERY = 256, 5000, 178
LICENCE = (
    "MAESTRO v2.0.0: C. Hawthorne et al., from performances of the International Piano-e-Competition, CC BY-NC-SA 4.0"
)
_FOLDER = "maestro-v2.0.0"
_TABLE = f"{_FOLDER}/maestro-v2.0.0.csv"
_COLUMNS = ("canonical_composer", "canonical_title", "split", "midi_filename")
_MOVEMENT = re.compile(r"\.p\d+\.midi?$")
# Raised when the same files would give other events.
_TOKENISER_VERSION = 1
_CHUNK = 1 << 20
_TIMEOUT = 60


@dataclass(frozen=True)
class Performance:
    """A row of the archive's table.

    Attributes:
        file: Path of the MIDI file below the archive's folder.
        title: Composer and title.
        split: ``train``, ``validation`` or ``test``.
    """

    file: str
    title: str
    split: str


def load_maestro(*, progress: bool = True) -> EventWindows:
    """Training and query windows, from ``GRASS_DATA/maestro`` where that variable is set, else from the network.

    The events are kept as parquet below ``runs/shared``, named after everything that decides them.

    Args:
        progress: Shows a bar while MIDI files are read, which takes a minute the first time.

    Raises:
        DataError: The archive is missing, damaged or unsafe, or gives too few windows.
    """
    path = _archive_path(progress)
    sha = _file_hash(path)
    label = _label()
    wanted = [sha, _TOKENISER_VERSION, LENGTH, N_TRAIN, N_QUERY]
    fingerprint = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    cache = _cache_folder() / f"maestro-{fingerprint[:12]}.parquet"
    with open_archive(path, label) as archive:
        performances = read_table(archive.read(_TABLE), label)
        pieces = read_pieces(cache, fingerprint)
        if pieces is None:
            pieces = _read(archive, performances, label, progress)
            write_pieces(cache, fingerprint, pieces)
    return event_windows(
        first_windows((piece for piece in pieces if piece.split == "train"), LENGTH, N_TRAIN),
        round_robin((piece for piece in pieces if piece.split == "test"), LENGTH, N_QUERY),
        source=_source(performances, sha),
        licence=LICENCE,
        kind=kind_of(sha, len(performances)),
        rows=len(performances),
    )


def maestro_problems() -> list[str]:
    """What keeps the data from being read here, one sentence each; asks nothing of the network."""
    missing = [name for name in ("mido", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        return [f"reading MAESTRO needs {' and '.join(missing)}, not installed here; run `make setup`"]
    try:
        folder = grass_data()
    except DataError as error:
        return [str(error)]
    if folder is not None and not (folder / "maestro" / ARCHIVE).is_file():
        return [_absent()]
    return []


def maestro_fingerprint() -> str:
    """A hash of the archive; the official one has the known hash.

    Raises:
        DataError: ``GRASS_DATA`` has no archive, or it cannot be read.
    """
    return SHA256 if grass_data() is None else _file_hash(_local_archive())


def maestro_is_here() -> bool:
    """Whether the archive is on this machine, so that music can be shown without the network."""
    try:
        return (_download_path() if grass_data() is None else _local_archive()).is_file()
    except DataError:
        return False


def read_table(content: bytes, label: str) -> list[Performance]:
    """Rows of the archive's table, sorted by path.

    Args:
        content: CSV in UTF-8.
        label: Name of the archive in messages.

    Raises:
        DataError: A column is missing, a split is unknown, a path is not a plain one or comes twice.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{label}: {_TABLE} cannot be read ({error}); fetch the archive again") from error
    found: dict[str, Performance] = {}
    for number, row in enumerate(rows, start=2):
        values = {name: row.get(name) or "" for name in _COLUMNS}
        file, split = PurePosixPath(values["midi_filename"]), values["split"]
        plain = not file.is_absolute() and ".." not in file.parts and file.suffix in (".midi", ".mid")
        if not all(values.values()) or split not in ("train", "validation", "test") or not plain or str(file) in found:
            raise DataError(
                f"{label}: line {number} of {_TABLE} is {values}; expected a value for each of these columns, split "
                "train, validation or test, and a MIDI file of its own. Fetch the archive again"
            )
        title = f"{values['canonical_composer']}: {values['canonical_title'].replace('_', ' ')}"
        found[str(file)] = Performance(str(file), title, split)
    return [found[file] for file in sorted(found)]


def kind_of(sha256: str, performances: int) -> str:
    """What an archive is: ``official``, a ``subset`` of fewer performances, or a ``substitute``.

    Args:
        sha256: Of the archive.
        performances: Rows of its table.
    """
    if sha256 == SHA256:
        return "official"
    return "subset" if performances < PERFORMANCES else "substitute"


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
                    f"{sha256}. Try again, or {_remedy()}"
                )
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(f"MAESTRO could not be fetched from {address} ({reason}). Try again, or {_remedy()}") from error


def _read(archive: SafeArchive, performances: Sequence[Performance], label: str, progress: bool) -> list[Piece]:
    """The pieces that windows are taken from; others are not unpacked."""

    def pieces(split: str, bar: Any) -> Iterator[Piece]:
        for one in performances:
            if one.split == split:
                notes = read_midi(archive.read(f"{_FOLDER}/{one.file}"), f"{label}: {one.file}")
                bar.update()
                yield Piece(one.file, one.title, split, encode(notes))

    found: list[Piece] = []
    with tqdm(desc="reading MIDI", unit="file", delay=3, disable=not progress) as bar:
        windows = 0
        for piece in pieces("train", bar):
            found.append(piece)
            windows += -(-len(piece.events) // LENGTH)
            if windows >= N_TRAIN:
                break
        found += pieces("test", bar)
    return found


def _source(performances: Sequence[Performance], sha: str) -> str:
    place = "storage.googleapis.com/magentadata" if grass_data() is None else "GRASS_DATA/maestro"
    if sha == SHA256:
        return f"{place}: MAESTRO v2.0.0, {len(performances):,} performances"
    counts: Mapping[str, int] = {
        split: sum(one.split == split for one in performances) for split in ("train", "validation", "test")
    }
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    movements = sum(bool(_MOVEMENT.search(one.file)) for one in performances)
    note = f"; {movements} are one piece or movement cut out of a performance" if movements else ""
    return f"{place}: a subset of MAESTRO v2.0.0, {len(performances)} files ({parts}){note}"


def _cache_folder() -> Path:
    return runs_root() / "shared" / "maestro"


def _download_path() -> Path:
    return _cache_folder() / ARCHIVE


def _archive_path(progress: bool) -> Path:
    if grass_data() is not None:
        return _local_archive()
    path = _download_path()
    if not path.is_file():
        fetch(path, progress=progress)
    found = _file_hash(path)
    if found != SHA256:
        raise DataError(f"{_label()} has SHA-256 {found}, expected {SHA256}; delete it to fetch it again")
    return path


def _local_archive() -> Path:
    folder = grass_data()
    path = None if folder is None else folder / "maestro" / ARCHIVE
    if path is None or not path.is_file():
        raise DataError(_absent())
    return path


def _label() -> str:
    return f"runs/shared/maestro/{ARCHIVE}" if grass_data() is None else f"GRASS_DATA's maestro/{ARCHIVE}"


def _absent() -> str:
    return (
        f"GRASS_DATA has no maestro/{ARCHIVE}; put the archive of MIDI files of MAESTRO v2.0.0 there, or unset "
        "GRASS_DATA to fetch it from its official address"
    )


def _remedy() -> str:
    return f"set GRASS_DATA to a folder that has maestro/{ARCHIVE}, or run with scale=embedded"


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{_label()} could not be read: {error.strerror or error}; make it readable") from error
    return digest.hexdigest()
