"""Notes as sound: a small synthesiser of struck strings, and OGG Vorbis for the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from grass_lib.errors import UsageError
from grass_lib.report.piano_roll import LOUDNESS, ONSET, PITCH, RELEASE, STEPS_PER_SECOND

RATE = 22_050
"""Samples a second, one channel."""
SECONDS = 10.0
"""Longest clip."""
_PARTIALS = 8
_ATTACK, _DAMPING, _RING, _FADE = 0.004, 0.06, 0.35, 0.25
"""Seconds: of the rise, of the decay once a key is up, kept after the last note, faded at a cut."""
_PEAK = 0.8


def synthesise(notes: Any, *, seconds: float = SECONDS, rate: int = RATE) -> np.ndarray:
    """Plays notes: harmonic partials that die away, the high ones sooner, as those of a string do.

    Args:
        notes: ``(n, 4)``: onset and release in steps of 10 ms, MIDI pitch, velocity.
        seconds: What comes later is cut, with a short fade.
        rate: Samples a second.

    Returns:
        float32 ``(n_samples,)`` within -1 and 1.

    Raises:
        UsageError: There is no note in that time, or the time is not above 0.
    """
    rows = np.asarray(notes, dtype=np.float64).reshape(-1, 4)
    rows = rows[rows[:, ONSET] < seconds * STEPS_PER_SECOND]
    if not len(rows) or seconds <= 0:
        raise UsageError(f"{len(rows)} notes begin in the first {seconds:g} s; expected one or more")
    length = min(rows[:, RELEASE].max() / STEPS_PER_SECOND + _RING, seconds)
    sound = np.zeros(max(1, round(length * rate)))
    for onset, release, pitch, velocity in rows[:, [ONSET, RELEASE, PITCH, LOUDNESS]].tolist():
        first = round(onset / STEPS_PER_SECOND * rate)
        last = min(len(sound), round((release / STEPS_PER_SECOND + _RING) * rate))
        time = np.arange(last - first) / rate
        key_up = (release - onset) / STEPS_PER_SECOND
        frequency = 440.0 * 2.0 ** ((pitch - 69) / 12)
        count = min(_PARTIALS, int(0.45 * rate / frequency))
        decay = 1.5 * 2.0 ** ((60 - pitch) / 18)
        tone = np.zeros_like(time)
        for partial in range(1, max(count, 1) + 1):
            tone += np.sin(2 * np.pi * frequency * partial * time) * np.exp(-time * partial**0.7 / decay) / partial**1.4
        tone *= np.minimum(time / _ATTACK, 1.0) * np.exp(-np.maximum(time - key_up, 0.0) / _DAMPING)
        sound[first:last] += tone * (velocity / 127) ** 1.5
    fade = min(len(sound), round(_FADE * rate))
    sound[len(sound) - fade :] *= np.linspace(1.0, 0.0, fade)
    return (sound * (_PEAK / max(np.abs(sound).max(), 1e-12))).astype(np.float32)


def ogg(samples: np.ndarray, rate: int = RATE) -> bytes:
    """OGG Vorbis of one channel.

    Args:
        samples: float32 ``(n_samples,)`` within -1 and 1.
        rate: Samples a second.

    Raises:
        UsageError: soundfile is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError where its library of codecs is missing
        raise UsageError("sound needs soundfile, which is not usable here; run `make setup`") from error
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, format="OGG", subtype="VORBIS", compression_level=0.7) as file:
        # Seconds at a time: the encoder takes a long block onto its stack.
        for start in range(0, len(samples), rate):
            file.write(samples[start : start + rate])
    return buffer.getvalue()


def audio_html(notes: Any, label: str) -> str:
    """A player with the sound of notes inside it, which asks nothing of the network.

    Args:
        notes: ``(n, 4)``, as in `synthesise`.
        label: What it plays, in words.
    """
    import html

    data = base64.b64encode(ogg(synthesise(notes))).decode()
    return (
        f'<audio class="gm-audio" controls preload="metadata" aria-label="{html.escape(label)}" '
        f'src="data:audio/ogg;base64,{data}"></audio>'
    )
