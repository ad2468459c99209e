"""Which training passages a query finds: those of its own article first, and how self-influence is spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grass_lib.errors import UsageError
from grass_lib.report.style import NEUTRAL, figure_style
from grass_lib.report.tables import with_formats

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_BAR = "#0072b2"


def _array(values: Any) -> Any:
    return np.asarray(getattr(values, "cpu", lambda: values)(), dtype=np.float64)


def own_article_rows(
    scores: Any, names: Sequence[str], articles: Sequence[str], titles: Sequence[str], first: int = 5
) -> list[dict[str, Any]]:
    """For each query with passages of its own article: how many of them are among the first proponents.

    Args:
        scores: (n_train, n_query), higher where a passage helps more.
        names: of the queries.
        articles: the article that each query asks about.
        titles: the article that each training passage is from.
        first: how many proponents are looked at.

    Returns:
        One dictionary per query whose article is among the passages: ``query``, ``article``, ``passages`` (of the
        article), ``found`` (among the first), ``by_chance`` (expected of a random order), ``best_rank`` (from 1) and
        ``rank_by_chance``.

    Raises:
        UsageError: shapes and lengths do not fit, or ``first`` is out of range.
    """
    matrix = _array(scores)
    shape = len(titles), len(names)
    if matrix.shape != shape or len(articles) != len(names) or not 1 <= first <= len(titles):
        raise UsageError(
            f"scores have shape {matrix.shape}, with {len(titles)} titles, {len(names)} names, {len(articles)} "
            f"articles and first={first}; expected (titles, names), an article each, and first up to the titles"
        )
    rows = []
    for place, (name, article) in enumerate(zip(names, articles, strict=True)):
        own = np.array([title == article for title in titles])
        if not own.any():
            continue
        order = np.argsort(-matrix[:, place], kind="stable")
        ranks = np.flatnonzero(own[order])
        rows.append(
            {
                "query": name,
                "article": article,
                "passages": int(own.sum()),
                "found": int((ranks < first).sum()),
                "by_chance": first * int(own.sum()) / len(titles),
                "best_rank": int(ranks[0]) + 1,
                "rank_by_chance": (len(titles) + 1) / (int(own.sum()) + 1),
            }
        )
    return rows


def own_article_table(rows: Sequence[dict[str, Any]], first: int = 5) -> pd.DataFrame:
    """The rows of `own_article_rows` as a table.

    Args:
        rows: one or more.
        first: how many proponents were looked at.

    Raises:
        UsageError: there are no rows.
    """
    import pandas as pd

    if not rows:
        raise UsageError("no query has passages of its own article; expected one or more rows")
    frame = pd.DataFrame(
        {
            "query": [row["query"] for row in rows],
            "article": [row["article"] for row in rows],
            f"among the first {first}": [row["found"] for row in rows],
            "expected by chance": [row["by_chance"] for row in rows],
            "best rank": [row["best_rank"] for row in rows],
            "best rank by chance": [row["rank_by_chance"] for row in rows],
        }
    )
    return with_formats(frame, {"expected by chance": "{:.2f}", "best rank by chance": "{:.1f}"})


def self_influence_figure(values: Any) -> Figure:
    """How self-influence is spread over the training passages.

    Args:
        values: (n_train,), positive.

    Raises:
        UsageError: there are none, or not all are finite.
    """
    import matplotlib.pyplot as plt

    found = _array(values)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise UsageError(f"self-influence has shape {found.shape} or values that are not finite; expected (n_train,)")
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 2.8), layout="constrained")
        axes.hist(found, bins=min(40, max(5, len(found) // 4)), color=_BAR)
        middle = float(np.median(found))
        axes.axvline(middle, color=NEUTRAL, linewidth=1.2, linestyle=":", label=f"median {middle:,.4g}")
        axes.set_xlabel("self-influence")
        axes.set_ylabel("passages")
        axes.legend()
    plt.close(figure)  # a notebook shows what the cell returns, and would show an open figure once more
    return figure
