"""MAESTRO v2.0.0 (Hawthorne et al. 2019): piano performances as windows of 256 events, from its archive of MIDI files.

Training windows are the first 5,000 of the official training split, its performances in the order of their paths.
Queries are 178 windows of the official test split, as many as it has performances: the first window of every
performance in that order, then the second of every one, and so on until there are enough.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tqdm import tqdm

from grass_lib.errors import DataError
from grass_lib.experiments.data.archive import SafeArchive, open_archive
from grass_lib.experiments.data.events import encode
from grass_lib.experiments.data.maestro_archive import SHA256, archive_hash, archive_label, archive_path, cache_folder
from grass_lib.experiments.data.midi import read_midi
from grass_lib.experiments.data.piece_cache import read_pieces, write_pieces
from grass_lib.experiments.data.sources import grass_data
from grass_lib.experiments.data.windows import (
    EventWindows,
    Piece,
    Window,
    cut,
    event_windows,
    first_windows,
    round_robin,
)

PERFORMANCES = 1282
"""Of the official archive."""
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
    path = archive_path(progress=progress)
    sha, label = archive_hash(path), archive_label()
    wanted = [sha, _TOKENISER_VERSION, LENGTH, N_TRAIN, N_QUERY]
    fingerprint = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    cache = cache_folder() / f"maestro-{fingerprint[:12]}.parquet"
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


def find_windows(places: Collection[tuple[str, int]]) -> dict[tuple[str, int], Window]:
    """Some windows by the file of their performance and their number in it, from the archive on this machine.

    Args:
        places: Which.

    Returns:
        Those of the performances that the archive has.

    Raises:
        DataError: The archive is missing, damaged or unsafe.
    """
    files = {file for file, _ in places}
    path, label = archive_path(), archive_label()
    with open_archive(path, label) as archive:
        chosen = [one for one in read_table(archive.read(_TABLE), label) if one.file in files]
        cuts = [cut(_piece(archive, one, label), LENGTH) for one in chosen]
    found = {(window.piece, window.number): window for windows in cuts for window in windows}
    return {place: found[place] for place in places if place in found}


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


def _read(archive: SafeArchive, performances: Sequence[Performance], label: str, progress: bool) -> list[Piece]:
    """The pieces that windows are taken from; others are not unpacked."""

    def pieces(split: str, bar: Any) -> Iterator[Piece]:
        for one in performances:
            if one.split == split:
                yield _piece(archive, one, label)
                bar.update()

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


def _piece(archive: SafeArchive, performance: Performance, label: str) -> Piece:
    notes = read_midi(archive.read(f"{_FOLDER}/{performance.file}"), f"{label}: {performance.file}")
    return Piece(performance.file, performance.title, performance.split, encode(notes))


def _source(performances: Sequence[Performance], sha: str) -> str:
    place = "storage.googleapis.com/magentadata" if grass_data() is None else "GRASS_DATA/maestro"
    if sha == SHA256:
        return f"{place}: MAESTRO v2.0.0, {len(performances):,} performances"
    counts: Mapping[str, int] = {
        split: sum(one.split == split for one in performances) for split in ("train", "validation", "test")
    }
    parts = ", ".join(f"{count} {split}" for split, count in counts.items())
    movements = sum(bool(_MOVEMENT.search(one.file)) for one in performances)
    share = "all" if movements == len(performances) else movements
    note = f"; {share} of them single pieces or movements of a performance" if movements else ""
    return f"{place}: a subset of MAESTRO v2.0.0, {len(performances)} files ({parts}){note}"
