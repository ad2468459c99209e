"""Galleries: query images beside the training images that raise or lower the model's output on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from grass_lib.errors import UsageError
from grass_lib.report.style import NEUTRAL, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: A committed notebook shows at most this many thumbnails.
MAX_THUMBNAILS = 60
PROPONENT_COLOUR = "#0072B2"
OPPONENT_COLOUR = "#D55E00"


class RankedSamples(Protocol):
    """What `grass_lib.attribution.ranking.topk` returns: indices and scores, both (n_query, 2, k), proponents first."""

    @property
    def indices(self) -> Any:
        """Training positions, (n_query, 2, k)."""
        ...

    @property
    def scores(self) -> Any:
        """Signed scores, (n_query, 2, k)."""
        ...


def _name(labels: Any, index: int, class_names: Sequence[str] | None) -> str:
    if labels is None:
        return ""
    label = int(labels[index])
    return class_names[label] if class_names is not None else str(label)


def _thumbnail(axes: Axes, image: np.ndarray, title: str, colour: str, below: str) -> None:
    axes.imshow(image, cmap="gray", interpolation="nearest", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, edgecolor=colour, linewidth=2.5)
    axes.set_title(title, fontsize=10, color=NEUTRAL, fontweight="normal", pad=3)
    axes.set_xlabel(below, fontsize=9.5, labelpad=3)


def score_text(score: float, digits: int = 3) -> str:
    """A score with its sign; from 100 to a million without a power of ten.

    Args:
        score: of a training sample.
        digits: how many to write of other numbers.
    """
    return f"{score:+,.0f}" if 100 <= abs(score) < 1e6 else f"{score:+.{digits}g}"


def image_gallery(
    query_images: Any,
    train_images: Any,
    ranked: RankedSamples,
    *,
    queries: Sequence[int],
    query_labels: Any = None,
    train_labels: Any = None,
    class_names: Sequence[str] | None = None,
    per_side: int = 4,
) -> Figure:
    """One row per query: the query, its strongest proponents, its strongest opponents, with signed scores.

    Args:
        query_images: grey (n_query, h, w) or colour (n_query, h, w, 3) images.
        train_images: the same for the training set, indexed by `ranked.indices`.
        ranked: proponents and opponents of every query, (n_query, 2, k).
        queries: positions of the queries to show.
        query_labels: class numbers (n_query,), written above the thumbnails.
        train_labels: class numbers (n_train,).
        class_names: names of the classes; the numbers where None.
        per_side: thumbnails per side.

    Returns:
        A matplotlib figure.

    Raises:
        UsageError: no query, more thumbnails than `MAX_THUMBNAILS`, a query that does not exist, or fewer ranked
            samples than `per_side`.
    """
    import matplotlib.pyplot as plt

    images, pool = np.asarray(query_images), np.asarray(train_images)
    indices, scores = np.asarray(ranked.indices), np.asarray(ranked.scores)
    total = len(queries) * (1 + 2 * per_side)
    if not 1 <= total <= MAX_THUMBNAILS:
        raise UsageError(
            f"{len(queries)} queries with {per_side} thumbnails per side make {total}, expected 1 to {MAX_THUMBNAILS}; "
            "name fewer queries or lower per_side"
        )
    if indices.ndim != 3 or indices.shape[1] != 2 or indices.shape[2] < per_side:
        raise UsageError(
            f"ranked.indices has shape {indices.shape}, expected (n_query, 2, k) with k >= per_side = {per_side}; "
            "rank more samples or lower per_side"
        )
    wrong = [query for query in queries if not 0 <= query < min(len(images), len(indices))]
    if wrong:
        raise UsageError(f"queries {wrong} do not exist, expected positions below {min(len(images), len(indices))}")
    widths = [1.15, 0.3, *[1.0] * per_side, 0.3, *[1.0] * per_side]
    with figure_style():
        figure, grid = plt.subplots(
            len(queries),
            len(widths),
            figsize=(0.76 * sum(widths), 1.28 * len(queries) + 0.3),
            gridspec_kw={"width_ratios": widths},
            squeeze=False,
            layout="constrained",
        )
        for axes_row, query in zip(grid, queries, strict=True):
            for gap in (1, 2 + per_side):
                axes_row[gap].axis("off")
            _thumbnail(axes_row[0], images[query], _name(query_labels, query, class_names), NEUTRAL, f"query {query}")
            for side, colour in enumerate((PROPONENT_COLOUR, OPPONENT_COLOUR)):
                start = 2 + side * (per_side + 1)
                for place in range(per_side):
                    sample = int(indices[query, side, place])
                    title = _name(train_labels, sample, class_names)
                    below = score_text(float(scores[query, side, place]), 2)
                    _thumbnail(axes_row[start + place], pool[sample], title, colour, below)
        figure.canvas.draw()
        for start, text, colour in (
            (2, "raise the output (proponents)", PROPONENT_COLOUR),
            (3 + per_side, "lower the output (opponents)", OPPONENT_COLOUR),
        ):
            left = grid[0][start].get_position().x0
            figure.text(left, 1.0, text, color=colour, fontsize=10.5, fontweight="bold", va="bottom", ha="left")
        plt.close(figure)
    return figure
