"""Gallery of texts: each query beside the training passages that helped and harmed the model's output on it most."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grass_lib.errors import UsageError
from grass_lib.report.galleries import RankedSamples, score_text

if TYPE_CHECKING:
    from IPython.display import HTML

Passages = Callable[[int], str] | Mapping[int, str] | Sequence[str]

#: A committed notebook shows at most this many excerpts, the queries included.
MAX_EXCERPTS = 60
SIDES = ("helped most", "harmed most")

# For a notebook opened by hand; in the book the same classes are styled by book/_static/book.css. Translucent greys
# suit a light page and a dark one.
_CSS = """
.grass-passages { font-size: 0.95em; line-height: 1.5; max-width: 66rem; }
.grass-passages p { margin: 0; overflow-wrap: anywhere; }
.gp-group { margin: 0 0 1.6rem; }
.gp-query { padding: 0.6rem 0.8rem; border-left: 4px solid #7a7a7a; background: rgba(122, 122, 122, 0.12); }
.gp-name, .gp-heading { font-weight: 600; }
.gp-sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.4rem; }
.gp-heading { padding: 0.6rem 0 0.2rem; }
.gp-list { list-style: none; margin: 0; padding: 0; }
.gp-passage { margin: 0; padding: 0.5rem 0; border-top: 1px solid rgba(122, 122, 122, 0.45); }
.gp-meta { display: flex; gap: 0.6rem; align-items: center; }
.gp-score { font-variant-numeric: tabular-nums; font-weight: 600; flex: none; min-width: 4.8em; }
.gp-bar { flex: 0 1 7rem; min-width: 2rem; height: 0.55rem; background: rgba(122, 122, 122, 0.2); }
.gp-bar span { display: block; height: 100%; }
.gp-positive { background: #0072b2; }
.gp-negative { background: #d55e00; }
.gp-index { margin-left: auto; white-space: nowrap; }
.gp-index, .gp-source { opacity: 0.8; }
"""


def excerpt(text: str, characters: int = 280) -> str:
    """The beginning of a text on one line, cut at a word.

    Args:
        text: any text.
        characters: how long the result may be, the ellipsis included.

    Returns:
        The text with runs of white space as single spaces and without control characters; an ellipsis where it was cut.
    """
    line = " ".join("".join(mark if unicodedata.category(mark) != "Cc" else " " for mark in text).split())
    if len(line) <= characters:
        return line
    head = line[: characters - 1]
    space = head.rfind(" ")
    # A text without spaces, such as Chinese or a long address, is cut where it is.
    return (head[:space] if space > characters // 2 else head).rstrip() + "…"


def _lookup(passages: Passages, index: int) -> str:
    if callable(passages):
        return passages(index)
    try:
        return passages[index]
    except (KeyError, IndexError) as error:
        raise UsageError(
            f"training passage {index} is among the ranked ones and has no text; give the text of every ranked passage"
        ) from error


def _item(index: int, text: str, score: float, largest: float) -> str:
    share = 100 * abs(score) / largest if largest else 0.0
    sign = "positive" if score >= 0 else "negative"
    return (
        '<li class="gp-passage"><div class="gp-meta">'
        f'<span class="gp-score">{score_text(score)}</span>'
        f'<span class="gp-bar" aria-hidden="true"><span class="gp-{sign}" style="width:{share:.1f}%"></span></span>'
        f'<span class="gp-index">training passage {index:,}</span></div>'
        f'<p dir="auto">{html.escape(text)}</p></li>'
    )


def _checked(queries: Sequence[str], top: RankedSamples, titles: Sequence[str] | None, per_side: int | None) -> Any:
    """Indices and scores (n_query, 2, per_side) as arrays."""
    indices, scores = (np.asarray(getattr(part, "cpu", lambda part=part: part)()) for part in (top.indices, top.scores))
    if indices.ndim != 3 or indices.shape[1] != 2 or indices.shape != scores.shape:
        raise UsageError(
            f"top.indices has shape {indices.shape} and top.scores {scores.shape}, expected (n_query, 2, k) for both; "
            "rank with topk"
        )
    kept = int(indices.shape[2]) if per_side is None else per_side
    if not 1 <= kept <= indices.shape[2]:
        raise UsageError(
            f"per_side is {kept}, expected 1 to {indices.shape[2]}, the number that was ranked; "
            "rank more samples or lower per_side"
        )
    for name, given in (("queries", queries), ("titles", titles)):
        if given is not None and len(given) != len(indices):
            raise UsageError(f"{len(given)} {name} for {len(indices)} ranked queries; give one each, in their order")
    total = len(indices) * (1 + 2 * kept)
    if not 1 <= total <= MAX_EXCERPTS:
        raise UsageError(
            f"{len(indices)} queries with {kept} passages per side make {total} excerpts, expected 1 to "
            f"{MAX_EXCERPTS}; rank fewer queries or lower per_side"
        )
    indices, scores = indices[..., :kept], scores[..., :kept]
    if not np.isfinite(scores).all():
        raise UsageError("top.scores holds values that are not finite; expected numbers, look at the scores")
    return indices, scores


def passages_html(
    queries: Sequence[str],
    passages: Passages,
    top: RankedSamples,
    *,
    titles: Sequence[str] | None = None,
    per_side: int | None = None,
    characters: int = 280,
    query_characters: int = 600,
    source: str = "",
    licence: str = "",
    embed: bool = False,
) -> str:
    """One box per query: its text, and below it the passages that helped most and harmed most, with signed scores.

    A bar shows the size of a score relative to the largest one shown for that query, its colour the sign.

    Args:
        queries: texts of the queries, in the order of `top`.
        passages: text of a training passage by its index.
        top: proponents and opponents of each query, (n_query, 2, k).
        titles: names of the queries; ``Query 1`` and so on where None.
        per_side: passages per side; all that were ranked where None.
        characters: length of an excerpt.
        query_characters: length of a query's text.
        source: where the passages come from, for the line below.
        licence: their licence.
        embed: put the styles into the result. False in a book, whose style sheet has them; True for a notebook opened
            by hand.

    Returns:
        An HTML fragment without scripts.

    Raises:
        UsageError: more than `MAX_EXCERPTS` excerpts (queries included), none, shapes that do not fit, or a passage
            without a text.
    """
    indices, scores = _checked(queries, top, titles, per_side)
    names = titles if titles is not None else [f"Query {place + 1}" for place in range(len(queries))]
    # Dollar signs in a passage are prices, not formulas: the two classes keep MathJax away.
    parts = ['<div class="grass-passages mathjax_ignore tex2jax_ignore">']
    if embed:
        parts.insert(0, f"<style>{_CSS}</style>")
    for place, (query, name) in enumerate(zip(queries, names, strict=True)):
        largest = float(np.abs(scores[place]).max())
        parts.append(
            f'<div class="gp-group"><div class="gp-query"><p class="gp-name">{html.escape(name)}</p>'
            f'<p dir="auto">{html.escape(excerpt(query, query_characters))}</p></div><div class="gp-sides">'
        )
        for side, heading in enumerate(SIDES):
            items = [
                _item(int(index), excerpt(_lookup(passages, int(index)), characters), float(score), largest)
                for index, score in zip(indices[place, side], scores[place, side], strict=True)
            ]
            parts.append(f'<div class="gp-side"><p class="gp-heading">{heading}</p><ol class="gp-list">')
            parts += [*items, "</ol></div>"]
        parts.append("</div></div>")
    if source or licence:
        words = [f"Passages: {source}" if source else "", f"licence: {licence}" if licence else ""]
        parts.append(f'<p class="gp-source">{html.escape("; ".join(word for word in words if word))}.</p>')
    return "".join([*parts, "</div>"])


def show_passages(queries: Sequence[str], passages: Passages, top: RankedSamples, **options: Any) -> HTML:
    """The gallery of `passages_html` as the last value of a notebook cell.

    Args:
        queries: texts of the queries.
        passages: text of a training passage by its index.
        top: proponents and opponents, (n_query, 2, k).
        **options: see `passages_html`.

    Returns:
        An IPython HTML object.
    """
    from IPython.display import HTML

    return HTML(passages_html(queries, passages, top, **options))
