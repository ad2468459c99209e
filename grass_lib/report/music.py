"""Gallery of music: each query window beside the training windows that helped and harmed it most, to see and to hear.

A run record names the windows, so that a gallery can be drawn later, where the music is at hand and may be shown.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from grass_lib.errors import UsageError
from grass_lib.experiments.data.events import decode, describe, pitch_name
from grass_lib.report.galleries import RankedSamples, score_text
from grass_lib.report.piano_roll import piano_roll_svg, roll_text
from grass_lib.report.sound import audio_html

if TYPE_CHECKING:
    from IPython.display import HTML

#: A page shows at most this many piano rolls and plays at most this many clips.
MAX_ROLLS, MAX_CLIPS = 60, 6
SIDES = ("helped most", "harmed most")
#: Class of a gallery without music, which the book replaces where it has the music.
LISTING = "gm-listing"
_CLIPS_PER_QUERY = 3
_LATER = (
    "Only the titles are stored with the run. Piano rolls and sound are drawn when the book is built where the music "
    "itself is at hand, in the folder GRASS_DATA."
)

# For a notebook opened by hand; in the book the same classes are styled by book/_static/book.css.
_CSS = """
.grass-music { font-size: 0.95em; line-height: 1.5; max-width: 66rem; }
.grass-music p { margin: 0; overflow-wrap: anywhere; }
.gm-group { margin: 0 0 1.8rem; }
.gm-query { padding: 0.6rem 0.8rem; border-left: 4px solid #7a7a7a; background: rgba(122, 122, 122, 0.12); }
.gm-name, .gm-heading, .gm-score { font-weight: 600; }
.gm-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.4rem; }
.gm-side { min-width: 0; }
.gm-heading { padding: 0.6rem 0 0.2rem; }
.gm-window { padding: 0.4rem 0 0.6rem; border-top: 1px solid rgba(122, 122, 122, 0.45); }
.gm-score { font-variant-numeric: tabular-nums; margin-right: 0.6em; }
.gm-roll { display: block; width: 100%; height: 5.5rem; margin: 0.3rem 0; color: #7a7a7a; }
.gm-helped .gm-roll { color: #0072b2; }
.gm-harmed .gm-roll { color: #d55e00; }
.gm-octaves { fill: none; stroke: #7a7a7a; stroke-opacity: 0.35; vector-effect: non-scaling-stroke; }
.gm-audio { display: block; width: 100%; max-width: 22rem; height: 2.2rem; }
.gm-asked, .gm-source { opacity: 0.8; }
"""


class MusicWindow(Protocol):
    """A window of events, as `grass_lib.experiments.data.windows.Window`."""

    @property
    def ids(self) -> Any:
        """Events, ``(length,)``."""
        ...

    @property
    def label(self) -> int:
        """The event after them."""
        ...

    @property
    def piece(self) -> str:
        """Name of the piece's file."""
        ...

    @property
    def title(self) -> str:
        """Title of the piece."""
        ...

    @property
    def number(self) -> int:
        """Which window of the piece, from 0."""
        ...


Places = Mapping[tuple[str, int], MusicWindow]


def places(*groups: Iterable[MusicWindow]) -> dict[tuple[str, int], MusicWindow]:
    """Windows by piece and number, as `music_html` looks them up."""
    return {(window.piece, window.number): window for group in groups for window in group}


def gallery_note(
    queries: Sequence[MusicWindow],
    train: Sequence[MusicWindow],
    top: RankedSamples,
    positions: Sequence[int],
    *,
    spec: str,
    source: str,
    licence: str,
) -> dict[str, Any]:
    """What a run record keeps of a gallery: which windows, their titles and scores, and no music.

    Args:
        queries: All query windows.
        train: All training windows.
        top: Proponents and opponents of the chosen queries, (n_chosen, 2, k).
        positions: Which queries were ranked, in the order of ``top``.
        spec: The compression behind the scores.
        source: Where the music comes from.
        licence: Whose it is.

    Raises:
        UsageError: The shapes do not fit, a score is not finite, or there are more than `MAX_ROLLS` windows.
    """
    indices, scores = (np.asarray(getattr(part, "cpu", lambda part=part: part)()) for part in (top.indices, top.scores))
    if indices.ndim != 3 or indices.shape[1] != 2 or indices.shape != scores.shape or len(indices) != len(positions):
        raise UsageError(
            f"top.indices has shape {indices.shape} and top.scores {scores.shape}, expected ({len(positions)}, 2, k) "
            "for both; rank the chosen queries with topk"
        )
    total = len(positions) * (1 + 2 * indices.shape[2])
    if total > MAX_ROLLS or not np.isfinite(scores).all():
        raise UsageError(
            f"a gallery of {total} windows, expected at most {MAX_ROLLS} with finite scores; rank fewer queries or "
            "fewer windows a side"
        )
    groups = []
    for place, position in enumerate(positions):
        sides = [
            [
                _entry(train[int(index)]) | {"position": int(index), "score": float(score)}
                for index, score in zip(indices[place, side], scores[place, side], strict=True)
            ]
            for side in range(2)
        ]
        groups.append({"query": _entry(queries[int(position)]) | {"position": int(position)}, "sides": sides})
    return {"spec": spec, "source": source, "licence": licence, "groups": groups}


def wanted(note: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Piece and number of every window of a gallery."""
    entries = [entry for group in note["groups"] for entry in (group["query"], *group["sides"][0], *group["sides"][1])]
    return {(str(entry["piece"]), int(entry["number"])) for entry in entries}


def music_html(note: Mapping[str, Any], windows: Places | None, *, embed: bool = False) -> str:
    """One box per query: its window, and below it those that helped most and harmed most, with signed scores.

    The first queries come with players, for them and for the first window of each side.

    Args:
        note: From `gallery_note`, or a run record's.
        windows: From `places`; None lists titles and scores without any music.
        embed: Puts the styles into the result. False in a book, whose style sheet has them; True for a notebook opened
            by hand.

    Returns:
        An HTML fragment without scripts.

    Raises:
        UsageError: A window of the gallery is not among those given.
    """
    missing = sorted(wanted(note) - set(windows)) if windows is not None else []
    if missing:
        raise UsageError(f"window {missing[0][1]} of {missing[0][0]} is in the gallery and was not given; give all")
    kind = "grass-music" if windows is not None else f"grass-music {LISTING}"
    parts = [f"<style>{_CSS}</style>" if embed else "", f'<div class="{kind} mathjax_ignore tex2jax_ignore">']
    for place, group in enumerate(note["groups"]):
        plays = (place + 1) * _CLIPS_PER_QUERY <= MAX_CLIPS
        parts.append(f'<div class="gm-group">{_box(group["query"], windows, "gm-query", plays)}<div class="gm-sides">')
        for heading, side, entries in zip(SIDES, ("gm-helped", "gm-harmed"), group["sides"], strict=True):
            parts.append(f'<div class="gm-side {side}"><p class="gm-heading">{heading}</p>')
            parts += [_box(entry, windows, "", plays and not rank) for rank, entry in enumerate(entries)]
            parts.append("</div>")
        parts.append("</div></div>")
    words = [] if windows is not None else [_LATER]
    words.append(f"Music: {note['source']}. {note['licence']}.")
    return "".join([*parts, *(f'<p class="gm-source">{html.escape(line)}</p>' for line in words), "</div>"])


def show_music(note: Mapping[str, Any], windows: Places | None, *, embed: bool = False) -> HTML:
    """The gallery of `music_html` as the last value of a notebook cell; arguments as there."""
    from IPython.display import HTML

    return HTML(music_html(note, windows, embed=embed))


def _entry(window: MusicWindow) -> dict[str, Any]:
    return {"piece": window.piece, "title": window.title, "number": window.number}


def _box(entry: Mapping[str, Any], windows: Places | None, kind: str, plays: bool) -> str:
    score = f'<span class="gm-score">{score_text(entry["score"])}</span>' if "score" in entry else ""
    prefix = "" if "score" in entry else f"Query {entry['position']}: "
    name = html.escape(f"{prefix}{entry['title']}, window {entry['number'] + 1}")
    head = f'<p class="gm-name">{score}{name}</p>'
    if windows is None:
        return f'<div class="gm-window {kind}">{head}</div>'
    window = windows[str(entry["piece"]), int(entry["number"])]
    notes = decode(window.ids.tolist())
    label = f"{entry['title']}: {roll_text(notes, pitch_name)}"
    asked = f'<p class="gm-asked">{html.escape(roll_text(notes, pitch_name))}; then {describe(window.label)}</p>'
    sound = audio_html(notes, f"Play {entry['title']}") if plays and len(notes) else ""
    return f'<div class="gm-window {kind}">{head}{asked}{piano_roll_svg(notes, label)}{sound}</div>'
