"""Figures of the report, drawn from run records only: LDS and projection time against k, seconds by phase.

``python -m grass_lib.report.figures`` redraws ``figures/`` from the records under ``book/measured/``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.report.figure_files import FORMATS, save_figure
from grass_lib.report.lines import LineLook, aside, line_key, line_keys, line_look, lines
from grass_lib.report.style import MARKER, METHODS, NEUTRAL, experiment_title, figure_style, method_of
from grass_lib.report.tables import Row, interval_text, k_name, pick_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from grass_lib.report.record import RunRecord

logger = logging.getLogger(__name__)


def series(rows: Iterable[Row], value: str) -> dict[str, list[Row]]:
    """Groups rows by method, each group sorted by k, in the order of the legend.

    Args:
        rows: result rows or published rows.
        value: the field that must be there, ``lds`` or ``projection_seconds``.

    Returns:
        Rows by key of `METHODS`; rows without k or without the value are left out.
    """
    groups: dict[str, list[Row]] = {name: [] for name in METHODS}
    for row in rows:
        if row.get("k") and row.get(value) is not None:
            groups[method_of(row["sparsification"], row["projection"])].append(row)
    return {name: sorted(group, key=lambda row: row["k"]) for name, group in groups.items() if group}


def comparable(published: Iterable[Row]) -> list[Row]:
    """Published rows with the rows called ``fjlt`` renamed to what they were, a dense Rademacher projection.

    Args:
        published: rows of ``published.json``.

    Returns:
        Copies of the rows.
    """
    renamed = []
    for row in published:
        projection = str(row["projection"])
        if projection.startswith("fjlt-"):
            projection = "rademacher-" + projection.removeprefix("fjlt-")
        renamed.append({**row, "projection": projection})
    return renamed


def with_counterpart(
    published: Mapping[str, Sequence[Row]], measured: Mapping[str, Sequence[Row]]
) -> dict[str, list[Row]]:
    """Published rows on whose line something was measured: those of a fitted mask have none in a run without one.

    Args:
        published: rows by method, as `series` gives them.
        measured: ours in the same form.

    Returns:
        The rows that stay, by method.
    """
    keys = {name: line_keys(group) for name, group in measured.items()}
    kept = {name: [row for row in rows if line_key(row) in keys.get(name, ())] for name, rows in published.items()}
    return {name: rows for name, rows in kept.items() if rows}


def k_title(rows: Iterable[Row]) -> str:
    """Title of the axis of k: factored compressions count per layer."""
    return "k per layer, compressed dimension" if k_name(rows) == "k per layer" else "k, compressed dimension"


def _k_axis(axes: Axes, rows: Sequence[Row]) -> None:
    ks = sorted({row["k"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [f"{k:,}" for k in ks])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.set_xlabel(k_title(rows))


def _draw_ceiling(axes: Axes, ceiling: Mapping[str, Any]) -> None:
    """A dotted line with its interval; words instead where the line would squeeze everything else."""
    low, high = ceiling.get("interval") or (ceiling["mean"], ceiling["mean"])
    bottom, top = axes.get_ylim()
    if low > top + 0.5 * (top - bottom):
        axes.set_ylim(bottom, top + 0.09 * (top - bottom))
        interval = interval_text(ceiling.get("interval"), 2)
        text = f"noise ceiling {ceiling['mean']:.2f}" + (f" ({interval})" if interval else "") + ", above the figure"
        axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top", fontsize=9.5)
        return
    axes.axhline(ceiling["mean"], color=NEUTRAL, linestyle=":", linewidth=1.5, label="noise ceiling")
    axes.axhspan(low, high, color=NEUTRAL, alpha=0.12, linewidth=0)


def _legend(axes: Axes, methods: Sequence[str]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    wanted = [*methods, "published", "noise ceiling"]
    order = sorted(range(len(labels)), key=lambda place: wanted.index(labels[place]))
    axes.legend(
        [handles[place] for place in order],
        [labels[place] for place in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=9.5,
    )


def _draw(
    axes: Axes,
    name: str,
    line: tuple[str, Sequence[Row]],
    values: Sequence[float],
    intervals: Sequence[Any],
    look: LineLook,
    shift: float = 1.0,
) -> None:
    """One line of a method with a bar for each interval; `shift` multiplies k, so that bars do not cover each other."""
    label, rows = line
    style = METHODS[name]
    bounds = [interval or (value, value) for interval, value in zip(intervals, values, strict=True)]
    axes.errorbar(
        [row["k"] * shift for row in rows],
        values,
        yerr=[
            [max(value - low, 0.0) for value, (low, _) in zip(values, bounds, strict=True)],
            [max(high - value, 0.0) for value, (_, high) in zip(values, bounds, strict=True)],
        ],
        color=style.colour,
        marker=style.marker,
        markersize=MARKER * look.size,
        linestyle=look.dash,
        label=label,
        elinewidth=1.2,
        capsize=2.5,
    )


def lds_figure(
    source: RunRecord | Iterable[Row],
    *,
    published: Iterable[Row] = (),
    noise_ceiling: Mapping[str, Any] | None = None,
    attributor: str | None = None,
    convention: str | None = None,
    title: str = "",
) -> Figure:
    """LDS against k, one line per method, bars for the 95 % interval.

    Args:
        source: a run record or its result rows.
        published: rows of ``published.json`` to draw hollow where we have any; only for a paper-scale run.
        noise_ceiling: ``{mean, interval}``; a dotted line with its interval, or words if far above.
        attributor: which attributor's rows; None takes that of the first row.
        convention: which damping convention; None takes that of the first row.
        title: title above the axes.

    Returns:
        A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    groups = series(pick_rows(source, attributor=attributor, convention=convention), "lds")
    paper = with_counterpart(series(comparable(published), "lds"), groups)
    names = list(groups)
    labels: list[str] = []
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        for name in names:
            style = METHODS[name]
            keys = line_keys(groups[name])
            for line in lines(groups[name]):
                key = line_key(line[1][0])
                labels.append(line[0])
                lds = [row["lds"] for row in line[1]]
                means, intervals = [one["mean"] for one in lds], [one.get("interval") for one in lds]
                _draw(axes, name, line, means, intervals, line_look(key, keys), aside(name, names, keys.index(key)))
            for _, rows in lines(paper[name]) if name in paper else ():
                key = line_key(rows[0])
                look = line_look(key, keys)
                axes.plot(
                    [row["k"] * aside(name, names, keys.index(key)) for row in rows],
                    [row["lds"] for row in rows],
                    color=style.colour,
                    marker=style.marker,
                    markersize=MARKER * look.size,
                    markerfacecolor="none",
                    linestyle=look.published,
                    linewidth=1.2,
                    alpha=0.75,
                    label="_published",
                )
        if paper:
            axes.plot([], [], color=NEUTRAL, marker="o", markerfacecolor="none", linestyle="--", label="published")
        if noise_ceiling is not None:
            _draw_ceiling(axes, noise_ceiling)
        _k_axis(axes, [row for group in (*groups.values(), *paper.values()) for row in group])
        axes.set_ylabel("LDS, mean over queries")
        axes.set_title(title)
        _legend(axes, labels)
        plt.close(figure)
    return figure


def time_figure(
    source: RunRecord | Iterable[Row],
    *,
    attributor: str | None = None,
    convention: str | None = None,
    title: str = "",
) -> Figure:
    """Seconds spent in projection against k, both axes logarithmic, one line per method, bars for the interval.

    Args:
        source: a run record or its result rows.
        attributor: which attributor's rows; None takes that of the first row.
        convention: which damping convention; None takes that of the first row.
        title: title above the axes.

    Returns:
        A matplotlib figure.
    """
    import matplotlib.pyplot as plt

    groups = series(pick_rows(source, attributor=attributor, convention=convention), "projection_seconds")
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        labels: list[str] = []
        for name, group in groups.items():
            keys = line_keys(group)
            for line in lines(group):
                labels.append(line[0])
                seconds = [row["projection_seconds"] for row in line[1]]
                bounds = [row.get("projection_seconds_interval") for row in line[1]]
                _draw(axes, name, line, seconds, bounds, line_look(line_key(line[1][0]), keys))
        _k_axis(axes, [row for rows in groups.values() for row in rows])
        axes.set_yscale("log")
        axes.set_ylabel("projection of the training set (s)")
        axes.set_title(title)
        _legend(axes, labels)
        plt.close(figure)
    return figure


def draw_record(record: RunRecord, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draws the figures of one run; published values stand beside a paper-scale run.

    Args:
        record: the run's record.
        folder: where to write.
        formats: suffixes to write.

    Returns:
        The files written.
    """
    from grass_lib.report import masks
    from grass_lib.report.influence_tables import split_figure, split_rows
    from grass_lib.report.masks import mask_rows
    from grass_lib.report.matching import Measured, with_more_layers
    from grass_lib.report.published import published_rows
    from grass_lib.report.systems import correlation_figure, systems_lds_figure

    as_published = record.scale == "paper" and not any(
        with_more_layers(record.experiment, row) for row in record.results
    )
    published = published_rows(record.experiment) if as_published else []
    title = f"{experiment_title(record.experiment)}, {record.scale} scale"
    substitute = Measured(record, {}).substitute
    title += f", substitute {substitute}" if substitute else ""
    ceiling = next((row["noise_ceiling"] for row in pick_rows(record) if row.get("noise_ceiling")), None)
    stem = record.experiment if record.scale == "paper" else f"{record.experiment}_{record.scale}"
    drawn: dict[str, Figure] = {}
    if mask_rows(record.results):
        drawn = masks.draw(record, title)
    elif any(row.get("system") for row in record.results):  # several systems: k alone does not tell them apart
        if any(row.get("lds") for row in record.results):
            drawn["lds"] = systems_lds_figure(record.results, title=title)
        agreement = record.extra.get("correlations")
        if agreement:
            drawn["agreement"] = correlation_figure(agreement["labels"], agreement["matrix"])
    else:
        drawn["lds"] = lds_figure(record, published=published, noise_ceiling=ceiling, title=title)
        if any(row.get("projection_seconds") for row in pick_rows(record)):
            drawn["projection_time"] = time_figure(record, title=title)
        if split_rows(record):
            drawn["time_split"] = split_figure(record, title=title)
    return [path for kind, figure in drawn.items() for path in save_figure(figure, f"{stem}_{kind}", folder, formats)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: redraws every figure from the committed records and benchmarks.

    Args:
        arguments: words of the command line; those of the process where None.

    Returns:
        Exit code: 0 when a figure was drawn, 1 when there is no record to draw from.
    """
    from grass_lib.report import kernels, systems_bench, throughput
    from grass_lib.report.record import load_record

    parser = argparse.ArgumentParser(prog="python -m grass_lib.report.figures", description=main.__doc__)
    parser.add_argument("--measured", type=Path, default=Path("book/measured"), help="folder with the committed runs")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder to write to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    paths = sorted(options.measured.glob("*/record.json"))
    drawn = [
        path
        for page in (kernels, throughput, systems_bench)
        for path in page.write_figures(options.measured, options.output)
    ]
    for written in drawn:
        logger.info("%s", written)
    if not paths and not drawn:
        logger.error(
            "no run record below %s, expected <experiment>-<scale>/record.json; "
            "`grass run mlp_mnist --scale paper` makes one to be copied there",
            options.measured,
        )
        return 1
    for path in paths:
        record = load_record(path)
        # A variant, such as a run with absolute damping beside it, must not take the place of the pair's own figures.
        if path.parent.name != f"{record.experiment}-{record.scale}":
            continue
        for written in draw_record(record, options.output):
            logger.info("%s", written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
