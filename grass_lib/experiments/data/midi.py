"""Notes of a MIDI file, with the sustain pedal; the files are read by mido."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from grass_lib.errors import DataError
from grass_lib.experiments.data.events import STEPS_PER_SECOND, as_notes

_SUSTAIN, _DOWN = 64, 64
_DEFAULT_TEMPO = 500_000
_LONGEST_SECONDS = 6 * 3600.0
_WRONG = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, ZeroDivisionError)


def read_midi(content: bytes, name: str) -> np.ndarray:
    """The notes of a file of pitches and times, all its tracks and channels together, percussion left out.

    A key that is let go while the sustain pedal of its channel is down (controller 64 at 64 or more) sounds on until
    the pedal comes up or the key is struck again.

    Args:
        content: Of a standard MIDI file of format 0 or 1.
        name: Of the file, for messages.

    Returns:
        int64 ``(n, 4)`` on the 10 ms grid, as `as_notes` makes them.

    Raises:
        DataError: It is not such a file, it holds no note, or mido is not installed.
    """
    try:
        import mido
    except ImportError as error:
        raise DataError("reading MIDI needs mido, not installed here; run `make setup`") from error
    try:
        file = mido.MidiFile(file=io.BytesIO(content))
        if file.type not in (0, 1) or file.ticks_per_beat <= 0:
            raise DataError(
                f"{name} is a MIDI file of format {file.type} with {file.ticks_per_beat} ticks a beat; expected format "
                "0 or 1 and one tick or more. Fetch the data again"
            )
        rows = _notes(mido.merge_tracks(file.tracks), file.ticks_per_beat)
    except DataError:
        raise
    except _WRONG as error:
        raise DataError(
            f"{name} cannot be read as MIDI ({type(error).__name__}: {error}); expected a standard MIDI file. Fetch "
            "the data again"
        ) from error
    if not rows:
        raise DataError(f"{name} holds no note; expected a piece of music. Fetch the data again")
    return as_notes(rows)


def _notes(messages: Any, ticks_per_beat: int) -> list[tuple[int, int, int, int]]:
    seconds, tempo = 0.0, _DEFAULT_TEMPO
    sounding: dict[tuple[int, int], tuple[float, int]] = {}
    held: dict[tuple[int, int], None] = {}  # released under the pedal, in order
    pedals: set[int] = set()
    rows: list[tuple[int, int, int, int]] = []

    def end(key: tuple[int, int]) -> None:
        started = sounding.pop(key, None)
        held.pop(key, None)
        if started is not None:
            onset, velocity = started
            rows.append((_step(onset), _step(seconds), key[1], velocity))

    for message in messages:
        seconds += message.time * tempo * 1e-6 / ticks_per_beat
        if seconds > _LONGEST_SECONDS:
            raise DataError(f"the piece lasts more than {_LONGEST_SECONDS:,.0f} s; expected a performance")
        if message.type == "set_tempo":
            tempo = message.tempo
        if message.is_meta or getattr(message, "channel", 9) == 9:
            continue
        if message.type == "control_change" and message.control == _SUSTAIN:
            if message.value >= _DOWN:
                pedals.add(message.channel)
                continue
            pedals.discard(message.channel)
            for key in [key for key in held if key[0] == message.channel]:
                end(key)
        elif message.type == "note_on" and message.velocity:
            key = message.channel, message.note
            end(key)
            sounding[key] = seconds, message.velocity
        elif message.type in ("note_on", "note_off"):
            key = message.channel, message.note
            if message.channel not in pedals:
                end(key)
            elif key in sounding:
                held[key] = None
    for key in list(sounding):
        end(key)
    return rows


def _step(seconds: float) -> int:
    return round(seconds * STEPS_PER_SECOND)
