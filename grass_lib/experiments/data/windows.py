"""Pieces of music as windows of events, each asked for the event that follows it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.events import END, PAD


@dataclass(frozen=True, eq=False)
class Piece:
    """One piece or performance.

    Attributes:
        name: Its file, which no other piece has.
        title: For people, the composer included.
        split: ``train`` or ``test``.
        events: int64 ``(n_events,)``.
    """

    name: str
    title: str
    split: str
    events: np.ndarray


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of a piece.

    Attributes:
        ids: int64 ``(length,)``; PAD after the last event of a piece.
        label: The event after the stretch, END at the end of a piece.
        piece: Name of its piece.
        title: Of its piece.
        number: Which window of the piece, from 0.
    """

    ids: Tensor
    label: int
    piece: str
    title: str
    number: int


@dataclass(frozen=True, eq=False)
class EventWindows:
    """Windows of one scale.

    Attributes:
        train: Training windows.
        queries: Query windows.
        train_ids: int64 ``(n_train, length)``.
        train_labels: int64 ``(n_train,)``, the event after each window.
        query_ids: int64 ``(n_query, length)``.
        query_labels: int64 ``(n_query,)``.
        source: Where the music comes from, in words.
        licence: Whose it is and what may be done with it, in words.
        kind: ``official``, ``subset``, ``substitute`` or ``embedded``.
        rows: Pieces read.
        sha256: Of all windows.
    """

    train: tuple[Window, ...]
    queries: tuple[Window, ...]
    train_ids: Tensor
    train_labels: Tensor
    query_ids: Tensor
    query_labels: Tensor
    source: str
    licence: str
    kind: str
    rows: int
    sha256: str

    @property
    def length(self) -> int:
        """Events in a window, padding included."""
        return self.train_ids.shape[1]


def cut(piece: Piece, length: int) -> list[Window]:
    """All windows of a piece, one after the other from its first event on, so that each is always the same.

    The last one is filled up with PAD, and its label is END.

    Args:
        piece: The piece.
        length: Events in a window.

    Raises:
        UsageError: ``length`` is below 1.
    """
    if length < 1:
        raise UsageError(f"windows of {length} events; expected 1 or more")
    events = torch.as_tensor(piece.events, dtype=torch.int64)
    found = []
    for number, start in enumerate(range(0, len(events), length)):
        part = events[start : start + length]
        ids = torch.full((length,), PAD, dtype=torch.int64)
        ids[: len(part)] = part
        after = start + len(part)
        label = int(events[after]) if after < len(events) else END
        found.append(Window(ids, label, piece.name, piece.title, number))
    return found


def first_windows(pieces: Iterable[Piece], length: int, count: int) -> list[Window]:
    """The first windows of some pieces, piece by piece; pieces that are not needed are not asked for.

    Args:
        pieces: In their order.
        length: Events in a window.
        count: How many.

    Raises:
        DataError: The pieces give fewer.
    """
    found: list[Window] = []
    for piece in pieces:
        found += cut(piece, length)
        if len(found) >= count:
            return found[:count]
    raise _too_few(len(found), count, length)


def round_robin(pieces: Iterable[Piece], length: int, count: int) -> list[Window]:
    """The first window of every piece, then the second of every piece, and so on.

    Args:
        pieces: In their order.
        length: Events in a window.
        count: How many.

    Raises:
        DataError: The pieces give fewer.
    """
    turns = zip_longest(*(cut(piece, length) for piece in pieces))
    found = [window for window in chain.from_iterable(turns) if window is not None][:count]
    if len(found) < count:
        raise _too_few(len(found), count, length)
    return found


def event_windows(
    train: Sequence[Window], queries: Sequence[Window], *, source: str, licence: str, kind: str, rows: int
) -> EventWindows:
    """Puts windows together; arguments are the fields of `EventWindows`."""
    train_ids, query_ids = (torch.stack([window.ids for window in windows]) for windows in (train, queries))
    train_labels, query_labels = (torch.tensor([window.label for window in windows]) for windows in (train, queries))
    digest = hashlib.sha256()
    for part in (train_ids, train_labels, query_ids, query_labels):
        digest.update(repr(tuple(part.shape)).encode())
        digest.update(part.numpy().astype("<i8").tobytes())
    return EventWindows(
        train=tuple(train),
        queries=tuple(queries),
        train_ids=train_ids,
        train_labels=train_labels,
        query_ids=query_ids,
        query_labels=query_labels,
        source=source,
        licence=licence,
        kind=kind,
        rows=rows,
        sha256=digest.hexdigest(),
    )


def _too_few(found: int, count: int, length: int) -> DataError:
    return DataError(
        f"the pieces give {found:,} windows of {length} events; expected {count:,} or more. Use shorter or fewer "
        "windows, or more pieces"
    )
