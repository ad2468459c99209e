"""Does a training recipe make networks worth predicting? Accuracy spread, noise ceiling and LDS, by recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from grass_lib.report.style import METHODS, NEUTRAL, figure_style, method_label
from grass_lib.report.tables import Row, interval_text, pick_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grass_lib.report.record import RunRecord

EXPERIMENT = "resnet9_cifar2"
#: Values of the parameter ``recipe`` in words.
RECIPES = {"paper": "as documented", "one_cycle": "one cycle"}
_FIRST, _SECOND = METHODS["sjlt"], METHODS["grass"]


def recipe_note(recipe: Any) -> dict[str, Any]:
    """What a record says about a recipe.

    Args:
        recipe: a dataclass with ``lr``, ``epochs``, ``batch_size`` and ``warm_up``.
    """
    return asdict(recipe)


def recipe_text(recipe: Any) -> str:
    """A recipe in words, from the dataclass or from `recipe_note`."""
    note = recipe if isinstance(recipe, Mapping) else recipe_note(recipe)
    rate = "rate up to {lr:g} and down again" if note["warm_up"] else "constant rate {lr:g}"
    return f"{{epochs}} epochs, batches of {{batch_size}}, {rate}".format(**note)


def accuracy_note(accuracy: Any, labels: Any) -> dict[str, Any]:
    """Accuracy of the models of a bank on its queries, as a record keeps it.

    Args:
        accuracy: ``(n_models, n_seeds)``, NaN where a subset has no second seed.
        labels: Labels of the queries ``(n_query,)``.

    Returns:
        ``first`` and ``second`` seeds' accuracies, ``mean``, ``deviation``, ``lowest`` and ``highest`` of all, and
        ``guessing``, the share of the largest class.
    """
    table = np.asarray(accuracy, dtype=np.float64)
    first, rest = table[:, 0], table[:, 1:].reshape(-1)
    second = rest[np.isfinite(rest)]
    values = np.concatenate([first, second])
    counts = np.bincount(np.asarray(labels))
    return {
        "first": [round(float(value), 6) for value in first],
        "second": [round(float(value), 6) for value in second],
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "guessing": float(counts.max() / counts.sum()),
    }


def accuracy_text(note: Mapping[str, Any]) -> str:
    """The spread of accuracies in a sentence.

    Args:
        note: from `accuracy_note`.
    """
    return (
        f"right on {note['mean']:.1%} of the queries on average, from {note['lowest']:.1%} to {note['highest']:.1%} "
        f"between networks; the larger class has {note['guessing']:.1%}"
    )


def ceiling_text(rows: Sequence[Row]) -> str:
    """The best LDS beside the noise ceiling, in a sentence.

    Args:
        rows: result rows with an LDS.
    """
    best = max(rows, key=lambda row: row["lds"]["mean"])
    ceiling = best.get("noise_ceiling")
    text = f"highest LDS {best['lds']['mean']:.3f} ({interval_text(best['lds'].get('interval'))}), {best['spec']}"
    if not ceiling:
        return f"{text}; no noise ceiling, because no subset was trained with two seeds"
    return f"{text}; noise ceiling {ceiling['mean']:.3f} ({interval_text(ceiling.get('interval'))})"


def accuracy_figure(note: Mapping[str, Any]) -> Figure:
    """One dot per network: the share of the queries that it gets right; a line at the share of the largest class.

    Args:
        note: from `accuracy_note`.

    Returns:
        A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    with figure_style():
        figure, axes = plt.subplots(figsize=(7.2, 2.0), layout="constrained")
        rows = [("first seeds", note["first"], _FIRST), ("second seeds", note["second"], _SECOND)]
        shown = [row for row in rows if row[1]]
        for place, (_, values, style) in enumerate(shown):
            # Dots of one accuracy are stacked, so that each network is seen.
            seen: dict[float, int] = {}
            heights = []
            for value in values:
                seen[value] = seen.get(value, -1) + 1
                heights.append(len(shown) - 1 - place + 0.09 * seen[value])
            axes.plot(values, heights, linestyle="", marker=style.marker, color=style.colour, markersize=5.5, alpha=0.8)
        axes.axvline(note["guessing"], color=NEUTRAL, linestyle=":", linewidth=1.5)
        axes.set_yticks(range(len(shown)), [row[0] for row in reversed(shown)])
        axes.set_ylim(-0.5, len(shown) - 0.2)
        low = min(note["guessing"], note["lowest"])
        axes.set_xlim(low - 0.03, min(1.02, note["highest"] + 0.03))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("queries right (dotted: share of the larger class)")
        axes.grid(axis="y", visible=False)
        plt.close(figure)
    return figure


def recipe_section(records: Iterable[RunRecord]) -> str:
    """Both recipes side by side at paper scale: accuracy of the networks, noise ceiling, LDS.

    Args:
        records: verified records, the best first; the first of each recipe counts.

    Returns:
        MyST Markdown: a table, and where both recipes were run a sentence that compares them. A recipe without a run
        has the command that makes one.
    """
    found: dict[str, RunRecord] = {}
    for record in records:
        if record.experiment == EXPERIMENT and record.scale == "paper" and record.extra.get("accuracy"):
            found.setdefault(str(record.parameters.get("recipe")), record)
    lines = [
        "| recipe | training | networks, second seeds | queries right, mean | lowest to highest | noise ceiling "
        "| best LDS |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_line(name, title, found.get(name)) for name, title in RECIPES.items()]
    return "\n".join([*lines, *_runs(found), "", *_comparison(found)]) + "\n"


def _runs(found: Mapping[str, RunRecord]) -> list[str]:
    """The runs behind the rows, in a sentence: their names are too long for a column."""
    named = [f"`{found[name].run_id}` ({title})" for name, title in RECIPES.items() if name in found]
    return ["", f"Measured in {' and '.join(named)}."] if named else []


def _best(record: RunRecord) -> Row:
    return max(pick_rows(record), key=lambda row: row["lds"]["mean"])


def _line(name: str, title: str, record: RunRecord | None) -> str:
    if record is None:
        command = f"not run: `grass run {EXPERIMENT} --scale paper -p recipe={name}`"
        return f"| {title} | {command} | | | | | |"
    accuracy, best = record.extra["accuracy"], _best(record)
    ceiling = best.get("noise_ceiling")
    lds = f"{best['lds']['mean']:.3f} ({interval_text(best['lds'].get('interval'))}), "
    cells = [
        title,
        recipe_text(record.extra["recipe"]),
        f"{len(accuracy['first'])} + {len(accuracy['second'])}",
        f"{accuracy['mean']:.3f}",
        f"{accuracy['lowest']:.3f} to {accuracy['highest']:.3f}",
        f"{ceiling['mean']:.3f} ({interval_text(ceiling.get('interval'))})" if ceiling else "",
        lds + method_label(best["sparsification"], best["projection"]),
    ]
    return "| " + " | ".join(cells) + " |"


def _comparison(found: Mapping[str, RunRecord]) -> list[str]:
    if not all(name in found for name in RECIPES):
        return ["The comparison in words appears here once both have been run."]
    paper, cycle = (found[name] for name in RECIPES)
    one, other = paper.extra["accuracy"], cycle.extra["accuracy"]
    first, second = _best(paper)["lds"]["mean"], _best(cycle)["lds"]["mean"]
    larger = second - first > max(_spread(paper), _spread(cycle))
    return [
        f"As documented, networks trained on half of the images are right on {one['mean']:.1%} of the queries "
        f"(the larger class has {one['guessing']:.1%}), and the best and the worst are {_points(one)} points apart. "
        f"After one cycle they are right on {other['mean']:.1%}, {_points(other)} points apart. The best LDS goes from "
        f"{first:.3f} to {second:.3f} on the same images; between the compressions of one run it differs by at most "
        f"{max(_spread(paper), _spread(cycle)):.3f}."
        + (" How the networks were trained matters more than how gradients are compressed." if larger else "")
        + _ceiling_remark(paper, cycle)
    ]


def _ceiling_remark(*records: RunRecord) -> str:
    """Why an LDS can lie above the ceiling, where one does."""
    best = [_best(record) for record in records]
    above = [row for row in best if row.get("noise_ceiling") and row["lds"]["mean"] > row["noise_ceiling"]["mean"]]
    if not above:
        return ""
    return (
        " A best LDS above the noise ceiling is no contradiction: the ceiling is an estimate from the subsets that "
        "were trained with a second seed, and its interval is wide where networks of one subset hardly agree."
    )


def _points(accuracy: Mapping[str, Any]) -> str:
    return f"{100 * (accuracy['highest'] - accuracy['lowest']):.1f}"


def _spread(record: RunRecord) -> float:
    """Difference of LDS between the best and the worst compression of a run."""
    values = [row["lds"]["mean"] for row in pick_rows(record)]
    return max(values) - min(values)
