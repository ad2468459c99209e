"""Tables and figures of the comparison with other systems."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grass_lib.attribution.presets import factgrass_spec, logra_spec
from grass_lib.baselines.systems import BergsonOptions, DattriOptions, LogIXOptions, Options, OursOptions
from grass_lib.baselines.workload import Outcome
from grass_lib.report.style import NEUTRAL, figure_style
from grass_lib.report.tables import Row, damping_text, interval_text, with_formats
from grass_lib.specs import CompressionSpec

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CACHING = ("set-up", "gradients", "more passes", "curvature")
_SYSTEM_COLOURS = {
    "grass_lib": "#0072B2",
    "logix": "#D55E00",
    "dattri": "#009E73",
    "bergson": "#D98C00",
    "kronfluence": "#9A3FA0",
}


def described(options: Options) -> tuple[str, str]:
    """A system's options in the terms of a result row: its compression as a spec, and the attributor.

    Args:
        options: Of any system. LogIX's encoders are uniform, or principal components; their spec is that of the dense
            type of the same size.
    """
    if isinstance(options, OursOptions):
        return str(CompressionSpec.parse(options.spec)), f"influence_{options.hessian.lower()}"
    if isinstance(options, LogIXOptions):
        return f"normal-{options.rank}*{options.rank}->identity", options.system
    if isinstance(options, BergsonOptions) and options.side:
        return f"{options.projection_type}-{options.side}*{options.side}->identity", options.system
    if isinstance(options, DattriOptions) and options.method != "trak":
        build = logra_spec if options.method == "logra" else factgrass_spec
        return str(build(options.k)), options.system
    return "identity", options.system


def costs(outcome: Outcome, tokens: int, *, alone: bool = True) -> dict[str, Any]:
    """Fields of a result row that say what a system cost.

    Args:
        outcome: Of the system.
        tokens: Of the training sequences.
        alone: Whether nothing else ran at that time; if not, seconds and memory are left out.
    """
    found: dict[str, Any] = {
        "system": outcome.system,
        "label": outcome.label,
        "version": outcome.version,
        "stored_bytes": outcome.stored_bytes,
        "in_memory": bool(outcome.details.get("in_memory")),
        "layers": outcome.details.get("layers"),
    }
    if not alone:
        return found
    caching = [outcome.peak_bytes[name] for name in CACHING if name in outcome.peak_bytes]
    walk = outcome.tokens_per_second(tokens, curvature=False) if outcome.seconds.get("gradients") else None
    return found | {
        "phase_seconds": {name: float(value) for name, value in outcome.seconds.items()},
        "tokens_per_second": walk,
        "tokens_per_second_ready": outcome.tokens_per_second(tokens, curvature=True),
        "scoring_seconds": sum(outcome.seconds.get(name, 0.0) for name in ("queries", "scoring")),
        "system_peak_bytes": max(caching, default=None),
    }


def checks_text(found: Iterable[Mapping[str, Any]]) -> str:
    """Whether two systems compute the same thing: a Markdown table, one row per check.

    Args:
        found: What ``crosscheck.judge`` gave.
    """
    lines = [
        "| theirs | ours | Spearman | largest difference | same | what remains |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for each in found:
        numbers = f"{each['spearman']:.6f} | {each['largest_difference']:.1e} | {'yes' if each['same'] else '**no**'}"
        lines.append(
            f"| {in_markdown(each['theirs'])} | {in_markdown(each['ours'])} | {numbers} | {in_markdown(each['rest'])} |"
        )
    return "\n".join(lines) + "\n"


def facts_text(found: Iterable[Mapping[str, Any]]) -> str:
    """What systems did other than expected when they were used as documented, seen in this run: a Markdown list.

    Args:
        found: ``{system, what, expected, seen, why}`` each.
    """
    lines = []
    for each in (each for each in found if each["seen"] != each["expected"]):
        what, expected, seen, why = (in_markdown(each[name]) for name in ("what", "expected", "seen", "why"))
        why = f" ({why})" if why else ""
        lines.append(f"- **{each['system']}**, {what}. One would expect: {expected}. Seen: **{seen}**{why}.")
    return "\n".join(lines) + "\n"


def in_markdown(text: str) -> str:
    """Text of a library as it is, in Markdown."""
    escaped = html.escape(str(text), quote=False)
    for mark in ("\\", "|", "*", "_", "`"):
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def cost_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Tokens/s, memory and bytes stored, one row per system and options.

    Args:
        rows: result rows with ``label``, ``tokens_per_second``, ``tokens_per_second_ready``, ``system_peak_bytes`` and
            ``stored_bytes``.
    """
    import pandas as pd

    records = [
        {
            "System": row["label"],
            "Tokens/s, one walk": row["tokens_per_second"],
            "Tokens/s, ready to score": row["tokens_per_second_ready"],
            "Scoring (s)": row["scoring_seconds"],
            "Memory (GB)": None if row["system_peak_bytes"] is None else row["system_peak_bytes"] / 1e9,
            "Stored (MB)": row["stored_bytes"] / 1e6,
        }
        for row in rows
    ]
    whole = "{:,.0f}"
    formats = {"Tokens/s, one walk": whole, "Tokens/s, ready to score": whole}
    formats |= {"Scoring (s)": "{:.2f}", "Memory (GB)": "{:.2f}", "Stored (MB)": "{:,.2f}"}
    return with_formats(pd.DataFrame(records), formats)


def systems_lds_table(rows: Iterable[Row]) -> pd.DataFrame:
    """LDS of every system with its interval and damping.

    Args:
        rows: result rows with ``label``; those without LDS are left out.
    """
    import pandas as pd

    records = [
        {
            "System": row["label"],
            "Features a layer": "" if row["k"] is None else f"{row['k']:,}",
            "LDS": float(row["lds"]["mean"]),
            "95 % interval": interval_text(row["lds"].get("interval")),
            "Damping": damping_text(row),
        }
        for row in rows
        if row.get("lds")
    ]
    return with_formats(pd.DataFrame(records), {"LDS": "{:.4f}"})


def systems_lds_figure(rows: Iterable[Row], *, title: str = "") -> Figure:
    """LDS of every system as a point with its 95 % interval, in the order of the rows.

    Args:
        rows: result rows with ``label`` and ``system``; those without LDS are left out.
        title: above the figure.
    """
    import matplotlib.pyplot as plt

    shown = [row for row in rows if row.get("lds")]
    with figure_style():
        figure, axes = plt.subplots(figsize=(8.4, 1.3 + 0.33 * len(shown)), layout="constrained")
        for place, row in enumerate(shown):
            mean = float(row["lds"]["mean"])
            low, high = row["lds"].get("interval") or (mean, mean)
            colour = _SYSTEM_COLOURS.get(row["system"], NEUTRAL)
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([mean], [place], color=colour, marker="o", markersize=6)
        edge = axes.get_xlim()[1]
        for place, row in enumerate(shown):
            text = f"{float(row['lds']['mean']):.3f}"
            axes.annotate(
                text, (1, place), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
                va="center", fontsize=9, color=NEUTRAL,
            )  # fmt: skip
        axes.set_xlim(min(0.0, axes.get_xlim()[0]), edge)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks(range(len(shown)), [row["label"] for row in shown], fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("LDS, mean over queries")
        axes.set_title(title, wrap=True)
        plt.close(figure)
    return figure


def correlation_figure(labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> Figure:
    """Mean Spearman correlation between the scores of all pairs, as a heat map with its numbers.

    Args:
        labels: One per row.
        matrix: Square.
    """
    import matplotlib.pyplot as plt

    size = len(labels)
    # A large figure is shown smaller than it is drawn.
    points = 9.0 if size <= 8 else 11.0
    with figure_style():
        figure, axes = plt.subplots(figsize=(2.8 + 0.5 * size, 1.6 + 0.42 * size))
        axes.grid(visible=False)
        image = axes.imshow(matrix, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_xticks(range(size), [str(place + 1) for place in range(size)], fontsize=points)
        axes.set_yticks(range(size), [f"{label}  {place + 1}" for place, label in enumerate(labels)], fontsize=points)
        axes.tick_params(length=0)
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                shade = "#111111" if value > 0.6 else "#ffffff"
                axes.text(j, i, _short(value), ha="center", va="center", fontsize=points, color=shade)
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
        bar.set_label("mean Spearman correlation")
        figure.tight_layout()
        plt.close(figure)
    return figure


def _short(value: float) -> str:
    """Two decimals without the zero before them: there is little room in a cell."""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.0f}"


def throughput_figure(rows: Sequence[Row]) -> Figure:
    """Tokens/s of caching as bars: one walk over the training set, and until queries can be scored.

    Args:
        rows: result rows with ``label``, ``system`` and both throughputs.
    """
    import matplotlib.pyplot as plt

    places = range(len(rows))
    with figure_style():
        figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.36 * len(rows)))
        colours = [_SYSTEM_COLOURS.get(row["system"], NEUTRAL) for row in rows]
        walk = [row["tokens_per_second"] or 0.0 for row in rows]
        ready = [row["tokens_per_second_ready"] or 0.0 for row in rows]
        axes.barh([place - 0.19 for place in places], walk, height=0.36, color=colours, label="one walk, stored")
        axes.barh(
            [place + 0.19 for place in places], ready, height=0.36, color=colours, alpha=0.5, hatch="///",
            edgecolor=NEUTRAL, linewidth=0.4, label="ready to score (curvature, further passes)",
        )  # fmt: skip
        axes.set_yticks(list(places), [row["label"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("tokens/s of caching")
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower right", fontsize=8.5)
        figure.tight_layout()
        plt.close(figure)
    return figure
