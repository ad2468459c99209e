"""Piano rolls as inline SVG: they take the colours of the page, and need no script and no file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

#: Columns of an array of notes: onset and release in steps of 10 ms, MIDI pitch, velocity.
ONSET, RELEASE, PITCH, LOUDNESS = range(4)
STEPS_PER_SECOND = 100
_SHADES = 4
_LOWEST_SHADE = 0.45
_MARGIN, _FEWEST_PITCHES = 2, 24


def extent(notes: Any) -> tuple[int, int, int]:
    """Lowest and highest pitch, and the steps until the last note ends; zeros where there is no note.

    Args:
        notes: ``(n, 4)``.
    """
    rows = np.asarray(notes).reshape(-1, 4)
    if not len(rows):
        return 0, 0, 0
    return int(rows[:, PITCH].min()), int(rows[:, PITCH].max()), int(rows[:, RELEASE].max())


def roll_text(notes: Any, name: Callable[[int], str] = str) -> str:
    """What a piano roll shows, in words for those who cannot see it.

    Args:
        notes: ``(n, 4)``.
        name: Name of a pitch.
    """
    low, high, steps = extent(notes)
    count = len(np.asarray(notes).reshape(-1, 4))
    if not count:
        return "no note"
    return f"{count} notes from {name(low)} to {name(high)} in {steps / STEPS_PER_SECOND:.1f} s"


def piano_roll_svg(notes: Any, label: str) -> str:
    """A piano roll: time from left to right, low pitches below, loud notes darker.

    Args:
        notes: ``(n, 4)``: onset and release in steps, pitch, velocity.
        label: What it shows, in words.

    Returns:
        An ``<svg class="gm-roll">`` as wide as its place; its notes are drawn in ``currentColor``.
    """
    import html

    rows = np.asarray(notes).reshape(-1, 4).astype(int)
    low, high, steps = extent(rows)
    middle = (low + high) / 2
    pitches = max(high - low + 1 + 2 * _MARGIN, _FEWEST_PITCHES)
    top = round(middle + pitches / 2)
    lines = "".join(f"M0 {top - pitch}H{max(steps, 1)}" for pitch in range(top - pitches, top + 1) if pitch % 12 == 0)
    parts = [
        f'<svg class="gm-roll" role="img" aria-label="{html.escape(label)}" preserveAspectRatio="none" '
        f'viewBox="0 0 {max(steps, 1)} {pitches}"><path class="gm-octaves" d="{lines}"/>'
    ]
    shades: dict[int, list[str]] = {}
    for onset, release, pitch, loudness in rows.tolist():
        shade = min(loudness * _SHADES // 128, _SHADES - 1)
        # A gap of one step keeps repeated notes apart.
        length = max(release - onset - 1, 1)
        shades.setdefault(shade, []).append(f"M{onset} {top - pitch - 1}h{length}v1h-{length}z")
    for shade, shapes in sorted(shades.items()):
        opacity = _LOWEST_SHADE + (1 - _LOWEST_SHADE) * (shade + 1) / _SHADES
        parts.append(f'<path fill="currentColor" fill-opacity="{opacity:.2f}" d="{"".join(shapes)}"/>')
    return "".join([*parts, "</svg>"])
