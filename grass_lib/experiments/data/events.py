"""Piano music as events: 388 of them, an END and a PAD, and the way from notes to events and back.

The vocabulary is that of Music Transformer (Huang et al. 2019, appendix A.2, after Oore et al. 2018): a note begins, a
note ends, time passes by 10 ms to 1 s, the loudness of the notes to come changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from grass_lib.errors import DataError

NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY = 0, 128, 256, 356
"""First number of each kind of event: 128 pitches begin, 128 end, 100 steps of time, 32 levels of loudness."""
EVENTS = 388
END, PAD = 388, 389
VOCABULARY = 390
STEPS_PER_SECOND = 100
LONGEST_SHIFT = 100
_PITCHES, _LEVELS = 128, 32
_LEVEL_WIDTH = 128 // _LEVELS
_DEFAULT_LEVEL = 16

ONSET, RELEASE, PITCH, LOUDNESS = range(4)
"""Columns of an array of notes."""


def as_notes(rows: Iterable[tuple[int, int, int, int]]) -> np.ndarray:
    """An array of notes, sorted by onset and pitch.

    Args:
        rows: ``(onset, release, pitch, velocity)``: steps of 10 ms from the beginning, MIDI numbers from 0 to 127.

    Returns:
        int64 ``(n, 4)``.

    Raises:
        DataError: A value is out of range.
    """
    notes = np.array(sorted(rows, key=lambda row: (row[ONSET], row[PITCH])), dtype=np.int64).reshape(-1, 4)
    midi = notes[:, PITCH:]
    if len(notes) and (notes[:, ONSET].min() < 0 or midi.min() < 0 or midi.max() > 127):
        raise DataError("a note has a negative onset, or a pitch or velocity outside 0 to 127; expected MIDI numbers")
    return notes


def encode(notes: np.ndarray) -> np.ndarray:
    """Events of a piece, its time counted from 0.

    At one time the notes that end come first, then those that begin, each from low to high. Notes last one step at
    least. Of several that begin together at one pitch the longest and the loudest stand for all; a note ends at the
    latest where its pitch begins anew. Loudness is named where its level changes.

    Args:
        notes: ``(n, 4)`` as `as_notes` makes them.

    Returns:
        int64 ``(n_events,)``, each below `EVENTS`.
    """
    notes = _disjoint(notes)
    n = len(notes)
    times = np.concatenate([notes[:, RELEASE], notes[:, ONSET]])
    begins = np.repeat([0, 1], n)
    pitches = np.tile(notes[:, PITCH], 2)
    levels = np.tile(notes[:, LOUDNESS] // _LEVEL_WIDTH, 2)
    events: list[int] = []
    clock, level = 0, -1
    for index in np.lexsort((pitches, begins, times)).tolist():
        wait = int(times[index]) - clock
        clock += wait
        full, rest = divmod(wait, LONGEST_SHIFT)
        events += [TIME_SHIFT + LONGEST_SHIFT - 1] * full
        if rest:
            events.append(TIME_SHIFT + rest - 1)
        if not begins[index]:
            events.append(NOTE_OFF + int(pitches[index]))
            continue
        if levels[index] != level:
            level = int(levels[index])
            events.append(VELOCITY + level)
        events.append(NOTE_ON + int(pitches[index]))
    return np.array(events, dtype=np.int64)


def decode(events: Iterable[int]) -> np.ndarray:
    """Notes of a stretch of events, its time counted from 0; END and PAD mean nothing here.

    A stretch from the middle of a piece may end notes that it never began, which is ignored, and may leave notes open,
    which end with it. Until it names a loudness, that is a middle one.

    Args:
        events: Numbers below `VOCABULARY`.

    Returns:
        int64 ``(n, 4)`` as `as_notes` makes them; velocities are the middle of their level.

    Raises:
        DataError: A number is not in the vocabulary.
    """
    open_notes: dict[int, tuple[int, int]] = {}
    rows: list[tuple[int, int, int, int]] = []
    clock, level = 0, _DEFAULT_LEVEL

    def close(pitch: int) -> None:
        started = open_notes.pop(pitch, None)
        if started is not None:
            onset, velocity = started
            rows.append((onset, max(clock, onset + 1), pitch, velocity))

    for event in events:
        number = int(event)
        if not 0 <= number < VOCABULARY:
            raise DataError(f"{number} is not an event; expected 0 to {VOCABULARY - 1}")
        if number in (END, PAD):
            continue
        if number >= VELOCITY:
            level = number - VELOCITY
        elif number >= TIME_SHIFT:
            clock += number - TIME_SHIFT + 1
        else:
            close(number % _PITCHES)
            if number < NOTE_OFF:
                open_notes[number] = clock, level * _LEVEL_WIDTH + _LEVEL_WIDTH // 2
    for pitch in list(open_notes):
        close(pitch)
    return as_notes(rows)


def _disjoint(notes: np.ndarray) -> np.ndarray:
    """The same notes where no pitch sounds twice at once."""
    merged: dict[tuple[int, int], list[int]] = {}
    for onset, release, pitch, velocity in notes.tolist():
        known = merged.setdefault((pitch, onset), [release, velocity])
        known[0], known[1] = max(known[0], release), max(known[1], velocity)
    rows: list[tuple[int, int, int, int]] = []
    keys = sorted(merged)
    for key, following in zip(keys, [*keys[1:], (-1, -1)], strict=True):
        (pitch, onset), (release, velocity) = key, merged[key]
        last = following[1] if following[0] == pitch else release
        rows.append((onset, max(min(release, last), onset + 1), pitch, velocity))
    return as_notes(rows)


def pitch_name(pitch: int) -> str:
    """Name of a MIDI pitch: 60 is C4."""
    names = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
    return f"{names[pitch % 12]}{pitch // 12 - 1}"


def describe(event: int) -> str:
    """An event in words.

    Args:
        event: Below `VOCABULARY`.

    Raises:
        DataError: It is not in the vocabulary.
    """
    if not 0 <= event < VOCABULARY:
        raise DataError(f"{event} is not an event; expected 0 to {VOCABULARY - 1}")
    if event >= EVENTS:
        return "the piece ends" if event == END else "padding"
    if event >= VELOCITY:
        return f"loudness {event - VELOCITY + 1} of {_LEVELS}"
    if event >= TIME_SHIFT:
        return f"{(event - TIME_SHIFT + 1) / STEPS_PER_SECOND:.2f} s pass"
    return f"{pitch_name(event % _PITCHES)} {'begins' if event < NOTE_OFF else 'ends'}"
