"""Notes of a MusicXML score, compressed (.mxl) or not: pitches, durations, ties, voices; repeats are played once."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from xml.etree import ElementTree

import numpy as np

from grass_lib.errors import DataError
from grass_lib.experiments.data.archive import SafeArchive
from grass_lib.experiments.data.events import STEPS_PER_SECOND, as_notes

TEMPO = 96.0
"""Quarters a minute where a score names none."""
_VELOCITY = 64
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_CONTAINER = "META-INF/container.xml"


def read_mxl(content: bytes, name: str) -> np.ndarray:
    """The notes of a compressed score; arguments, result and errors as in `read_musicxml`."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            archive = SafeArchive(file, name)
            container = ElementTree.fromstring(archive.read(_CONTAINER))
            path = next(node.get("full-path") for node in container.iter() if node.tag.endswith("rootfile"))
            score = archive.read(path or "")
    except (zipfile.BadZipFile, ElementTree.ParseError, StopIteration) as error:
        raise DataError(f"{name} is no compressed MusicXML score ({error}); install its package again") from error
    return read_musicxml(score, name)


def read_musicxml(content: bytes, name: str) -> np.ndarray:
    """The notes of a score in time: all parts together, grace notes left out, at the first tempo that it names.

    Args:
        content: MusicXML, part by part.
        name: Of the score, for messages.

    Returns:
        int64 ``(n, 4)`` as `as_notes` makes them; a score has no performed loudness, so velocities are 64.

    Raises:
        DataError: It is not such a score, or it holds no note.
    """
    try:
        root = ElementTree.fromstring(content)
        steps = 60 * STEPS_PER_SECOND / Fraction(_tempo(root)).limit_denominator(1000)
        rows = []
        for part in root.findall("part"):
            for onset, release, pitch in _tied(_part_notes(part)):
                start, end = (round(time * steps) for time in (onset, release))
                rows.append((start, end, pitch, _VELOCITY))
    except (ElementTree.ParseError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise DataError(f"{name} cannot be read as MusicXML ({error}); install its package again") from error
    if root.tag != "score-partwise" or not rows:
        raise DataError(
            f"{name} is a <{root.tag}> with {len(rows)} notes; expected a <score-partwise> with one or more. Install "
            "its package again"
        )
    return as_notes(rows)


def _tempo(root: ElementTree.Element) -> float:
    for sound in root.iter("sound"):
        tempo = sound.get("tempo")
        if tempo is not None and float(tempo) > 0:
            return float(tempo)
    return TEMPO


def _part_notes(part: ElementTree.Element) -> Iterator[tuple[Fraction, Fraction, int, bool]]:
    """Onset and release in quarters, pitch, and whether the note goes on from a tie, in the order of the score."""
    divisions, begins = Fraction(1), Fraction(0)
    for measure in part.findall("measure"):
        time = end = last = begins
        for node in measure:
            if node.tag == "attributes" and node.find("divisions") is not None:
                divisions = Fraction(node.findtext("divisions") or "")
            if node.tag not in ("note", "backup", "forward") or node.find("grace") is not None:
                continue
            duration = Fraction(node.findtext("duration") or "") / divisions
            if node.tag == "backup":
                time -= duration
                continue
            onset = last if node.find("chord") is not None else time
            time = onset + duration
            end, last = max(end, time), onset
            pitch = node.find("pitch")
            if node.tag == "note" and pitch is not None:
                tied = any(tie.get("type") == "stop" for tie in node.findall("tie"))
                yield onset, time, _number(pitch), tied
        begins = end


def _tied(notes: Iterator[tuple[Fraction, Fraction, int, bool]]) -> list[tuple[Fraction, Fraction, int]]:
    """Joins each note that a tie continues to the one that ends where it begins."""
    joined: list[tuple[Fraction, Fraction, int]] = []
    open_at: dict[tuple[Fraction, int], int] = {}
    for onset, release, pitch, tied in notes:
        place = open_at.pop((onset, pitch), None) if tied else None
        if place is None:
            place = len(joined)
            joined.append((onset, release, pitch))
        else:
            joined[place] = joined[place][0], release, pitch
        open_at[release, pitch] = place
    return joined


def _number(pitch: ElementTree.Element) -> int:
    """MIDI number of a pitch; middle C, the C of octave 4, is 60."""
    step, octave = pitch.findtext("step") or "", int(pitch.findtext("octave") or "")
    return 12 * (octave + 1) + _STEPS[step] + round(float(pitch.findtext("alter") or 0))
