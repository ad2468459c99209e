"""Where the seconds of influence functions go: forward and backward, compression, writing, curvature, scoring."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from grass_lib.errors import UsageError
from grass_lib.report.style import NEUTRAL, PHASES, figure_style, method_label, stage_text
from grass_lib.report.tables import (
    Form,
    Row,
    k_name,
    method_columns,
    result_rows,
    row_order,
    seconds_text,
    with_formats,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from grass_lib.report.record import RunRecord


def split_rows(source: RunRecord | Iterable[Row]) -> list[Row]:
    """Rows that say their seconds by phase, each compression once, ordered by method and k.

    Args:
        source: a run record or its result rows.

    Returns:
        The rows; none where no row has ``seconds``.
    """
    unique: dict[str, Row] = {}
    for row in result_rows(source):
        if row.get("seconds"):
            unique.setdefault(stage_text(row["sparsification"], row["projection"]), row)
    return sorted(unique.values(), key=lambda row: row_order({**row, "attributor": ""}))


def _timed(source: RunRecord | Iterable[Row]) -> list[Row]:
    rows = split_rows(source)
    if not rows:
        raise UsageError(
            f"no result row has seconds by phase, expected seconds={{{', '.join(PHASES)}}} in at least one; "
            "give them to Run.result"
        )
    return rows


def phase_seconds(row: Row) -> dict[str, float]:
    """Seconds by phase in the order of `PHASES`; phases with another name are summed as ``other``.

    Args:
        row: a result row with ``seconds``.

    Returns:
        Seconds (s) of the phases that the row has.
    """
    seconds = row["seconds"]
    known = {name: float(seconds[name]) for name in PHASES if name in seconds}
    others = [float(value) for name, value in seconds.items() if name not in PHASES]
    return known | {"other": sum(others)} if others else known


def split_table(source: RunRecord | Iterable[Row]) -> pd.DataFrame:
    """Seconds by phase, their sum and the throughput of caching, one row per compression.

    Args:
        source: a run record or its result rows; rows without ``seconds`` are left out.

    Returns:
        Columns of the method (the compression as typed only where method and k do not tell two rows apart), one column
        per phase (s), ``Sum (s)`` and, where a row has it, ``Tokens/s, caching``: over the seconds of caching alone,
        without curvature and scoring.

    Raises:
        UsageError: no row has seconds by phase.
    """
    import pandas as pd

    rows = _timed(source)
    parts = [phase_seconds(row) for row in rows]
    names = {name: style.label for name, style in PHASES.items()} | {"other": "other"}
    shown = [name for name in names if any(name in part for part in parts)]
    k = k_name(rows)
    records: list[dict[str, Any]] = []
    for row, part in zip(rows, parts, strict=True):
        record = method_columns(row, k)
        record |= {f"{names[name].replace('/', ' / ').capitalize()} (s)": part.get(name) for name in shown}
        record["Sum (s)"] = sum(part.values())
        if any(other.get("tokens_per_second") for other in rows):
            record["Tokens/s, caching"] = row.get("tokens_per_second")
        record["Compression"] = stage_text(row["sparsification"], row["projection"])
        records.append(record)
    formats: dict[str, Form] = {name: seconds_text for name in records[0] if name.endswith("(s)")}
    frame = pd.DataFrame(records)
    if not frame.duplicated(["Method", k]).any():
        frame = frame.drop(columns="Compression")
    return with_formats(frame, formats | {"Tokens/s, caching": "{:,.0f}"})


def split_figure(source: RunRecord | Iterable[Row], *, title: str = "") -> Figure:
    """Seconds by phase as stacked bars, one per compression, with the tokens/s of caching beside the bars.

    Args:
        source: a run record or its result rows; rows without ``seconds`` are left out.
        title: title above the axes.

    Returns:
        A matplotlib figure.

    Raises:
        UsageError: no row has seconds by phase.
    """
    import matplotlib.pyplot as plt

    rows = _timed(source)
    parts = [phase_seconds(row) for row in rows]
    looks = {name: (style.label, style.colour, style.hatch) for name, style in PHASES.items()}
    looks["other"] = ("other", "#B0B0B0", "|||")
    places = list(range(len(rows)))
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.2, 1.3 + 0.31 * len(rows)), layout="constrained")
        left = [0.0] * len(rows)
        for name, (label, colour, hatch) in looks.items():
            widths = [part.get(name, 0.0) for part in parts]
            if not any(widths):
                continue
            axes.barh(
                places,
                widths,
                left=left,
                height=0.68,
                color=colour,
                hatch=hatch,
                edgecolor="#ffffff90",
                linewidth=0.6,
                label=label,
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        # The numbers stand in one column right of the axes, where neither bars nor the frame cross them.
        edge = 1.05 * max(left) or 1.0
        speeds = [row.get("tokens_per_second") for row in rows]
        for place, speed in zip(places, speeds, strict=True):
            if speed:
                axes.text(1.015 * edge, place, f"{speed:,.0f}", va="center", color=NEUTRAL, fontsize=9)
        labels = [f"{method_label(row['sparsification'], row['projection'])}, {row['k'] or 0:,}" for row in rows]
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlim(0, edge)
        axes.set_xlabel("seconds (at the right: tokens/s while caching)" if any(speeds) else "seconds")
        axes.set_ylabel(f"method, {k_name(rows)}")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=6, fontsize=9.5, handlelength=1.6, columnspacing=1.2)
        plt.close(figure)
    return figure
