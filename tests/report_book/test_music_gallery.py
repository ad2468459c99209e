"""Piano rolls, sound and the gallery of music, on windows that the test makes up."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from book_fixtures import html_output, toy_record, toy_windows
from nbformat.v4 import new_code_cell, new_notebook

from grass_lib.attribution.ranking import topk
from grass_lib.errors import UsageError
from grass_lib.experiments.data import events, maestro, maestro_archive
from grass_lib.report import piano_roll
from grass_lib.report.music import LISTING, MAX_CLIPS, gallery_note, music_html, places, wanted
from grass_lib.report.music_pages import with_music
from grass_lib.report.piano_roll import piano_roll_svg, roll_text
from grass_lib.report.sound import RATE, ogg, synthesise

NOTES = np.array([[0, 50, 69, 64], [50, 100, 81, 120], [100, 400, 57, 30]])
WORDS = {"spec": "sjlt-8", "source": "a <choir>", "licence": "public domain"}


def note_of(n_query: int = 3, per_side: int = 2) -> dict[str, Any]:
    train, queries = toy_windows(12, "train"), toy_windows(n_query, "query")
    scores = torch.randn(12, n_query, generator=torch.Generator().manual_seed(0))
    return gallery_note(queries, train, topk(scores, per_side), range(n_query), **WORDS)


def all_places(n_query: int = 3) -> Any:
    return places(toy_windows(12, "train"), toy_windows(n_query, "query"))


def test_columns_are_those_of_the_events() -> None:
    for name in ("ONSET", "RELEASE", "PITCH", "LOUDNESS", "STEPS_PER_SECOND"):
        assert getattr(piano_roll, name) == getattr(events, name)


def test_piano_roll_places_notes_in_time_and_pitch() -> None:
    svg = piano_roll_svg(NOTES, 'a "roll" & more')
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    assert (width, height) == (400, 29)  # 25 pitches and two on each side
    assert 'aria-label="a &quot;roll&quot; &amp; more"' in svg
    shapes = re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", svg)
    drawn = sorted((int(x), int(y), int(w)) for x, y, w in shapes)
    assert [(x, w) for x, _, w in drawn] == [(0, 49), (50, 49), (100, 299)]
    rows = [y for _, y, _ in drawn]
    assert (rows[0] - rows[1], rows[2] - rows[0]) == (12, 12)  # higher notes are further up
    assert all(0 <= y < height for y in rows)
    opacities = [float(text) for text in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    assert len(opacities) == 3
    assert max(opacities) == 1.0
    assert "M0 " not in piano_roll_svg(np.empty((0, 4)), "nothing").split("gm-octaves")[0]


def test_words_of_a_piano_roll() -> None:
    assert roll_text(NOTES, events.pitch_name) == "3 notes from A3 to A5 in 4.0 s"
    assert roll_text([]) == "no note"


def spectrum_peak(samples: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))))) * RATE / len(samples)


def test_sound_has_the_pitch_and_the_loudness_of_the_notes() -> None:
    sound = synthesise(NOTES)
    assert np.abs(sound).max() == pytest.approx(0.8, abs=1e-3)
    assert len(sound) == pytest.approx(4.35 * RATE, abs=2)
    for start, frequency in ((0.0, 440.0), (0.55, 880.0), (1.5, 220.0)):
        part = sound[round(start * RATE) : round((start + 0.4) * RATE)]
        assert spectrum_peak(part) == pytest.approx(frequency, abs=3.0)
    quiet, loud = (np.abs(sound[round(t * RATE) : round((t + 0.2) * RATE)]).max() for t in (1.1, 0.55))
    assert loud > 3 * quiet
    assert not np.abs(sound[-20:]).max() > 0.02


def test_long_music_is_cut_to_ten_seconds() -> None:
    notes = np.array([[100 * i, 100 * i + 90, 40 + i, 64] for i in range(40)])
    assert len(synthesise(notes)) == 10 * RATE
    for wrong in (np.empty((0, 4)), [[2000, 2100, 60, 64]]):
        with pytest.raises(UsageError, match="expected one or more"):
            synthesise(wrong)


def test_ogg_is_mono_and_small() -> None:
    sound = synthesise(np.array([[100 * i, 100 * i + 90, 50 + i, 64] for i in range(40)]))
    content = ogg(sound)
    assert content[:4] == b"OggS"
    assert len(content) < 80_000
    back, rate = soundfile.read(io.BytesIO(content))
    assert (back.ndim, rate, len(back)) == (1, RATE, len(sound))
    assert np.corrcoef(back, sound)[0, 1] > 0.95


def test_gallery_has_a_roll_for_every_window_and_six_players() -> None:
    text = music_html(note_of(4), all_places(4))
    assert text.count("<svg") == 4 * 5
    assert text.count("<audio") == MAX_CLIPS
    assert len(set(re.findall(r"base64,([^\"]+)", text))) == MAX_CLIPS
    assert all(base64.b64decode(part)[:4] == b"OggS" for part in re.findall(r"base64,([^\"]+)", text))
    assert (text.count("helped most"), text.count("harmed most")) == (4, 4)
    assert "a &lt;choir&gt;" in text
    assert "<script" not in text
    assert "http" not in text
    assert "<style>" not in text
    assert "<style>" in music_html(note_of(), all_places(), embed=True)


def test_note_names_windows_and_holds_no_music() -> None:
    note = note_of(2)
    assert len(wanted(note)) <= 10
    group = note["groups"][1]
    assert (group["query"]["piece"], group["query"]["number"], group["query"]["position"]) == ("query", 1, 1)
    helped, harmed = group["sides"]
    assert helped[0]["score"] > helped[1]["score"] > harmed[1]["score"] > harmed[0]["score"]
    assert set(helped[0]) == {"piece", "title", "number", "position", "score"}


def test_list_of_titles_without_music() -> None:
    text = music_html(note_of(), None)
    assert LISTING in text
    assert "<svg" not in text
    assert "<audio" not in text
    assert "GRASS_DATA" in text
    assert text.count("train &amp; co, window") == 12


def test_galleries_that_cannot_be() -> None:
    train, queries = toy_windows(12, "train"), toy_windows(3, "query")
    top = topk(torch.randn(12, 3), 2)
    with pytest.raises(UsageError, match=r"expected \(2, 2, k\)"):
        gallery_note(queries, train, top, [0, 1], **WORDS)
    with pytest.raises(UsageError, match="at most 60"):
        gallery_note(queries, train, topk(torch.randn(30, 3), 12), [0, 1, 2], **WORDS)
    broken = SimpleNamespace(indices=np.zeros((3, 2, 1), int), scores=np.full((3, 2, 1), np.nan))
    with pytest.raises(UsageError, match="finite"):
        gallery_note(queries, train, broken, [0, 1, 2], **WORDS)
    with pytest.raises(UsageError, match="give all"):
        music_html(note_of(), places(train))


@dataclass
class Found:
    """Stands in for the archive of MAESTRO."""

    asked: Any = None

    def __call__(self, names: Any) -> Any:
        self.asked = set(names)
        return {place: window for place, window in all_places().items() if place in names}


def page(text: str) -> Any:
    return new_notebook(cells=[new_code_cell("show", outputs=[html_output("<p>table</p>"), html_output(text)])])


def test_a_page_gets_its_music_only_where_the_archive_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    note, found = note_of(), Found()
    record = toy_record(extra={"gallery": note})
    listing = music_html(note, None)
    monkeypatch.setattr(maestro, "find_windows", found)
    monkeypatch.setattr(maestro_archive, "archive_here", lambda: None)
    untouched = with_music(page(listing), record)
    assert untouched.cells[0].outputs[1]["data"]["text/html"] == listing
    monkeypatch.setattr(maestro_archive, "archive_here", lambda: tmp_path)
    drawn = with_music(page(listing), record).cells[0].outputs
    assert found.asked == wanted(note)
    assert drawn[0]["data"]["text/html"] == "<p>table</p>"
    assert drawn[1]["data"]["text/html"].count("<audio") == MAX_CLIPS
    # Another archive than the run's: the titles stay.
    monkeypatch.setattr(maestro, "find_windows", lambda names: {})
    assert with_music(page(listing), record).cells[0].outputs[1]["data"]["text/html"] == listing
    other = music_html(note, all_places())
    assert with_music(page(other), record).cells[0].outputs[1]["data"]["text/html"] == other
    assert with_music(page(listing), toy_record()).cells[0].outputs[1]["data"]["text/html"] == listing
