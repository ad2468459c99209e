"""Tables and figures of the page on masks: correlation, paired differences of LDS, kept pixels, cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grass_lib.report.style import MASK_WAYS, NEUTRAL, figure_style
from grass_lib.report.tables import Row, seconds_text, with_formats

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from grass_lib.report.record import RunRecord

SHARING = {False: "a mask of its own for every network", True: "one mask for all networks"}


def mask_rows(rows: Iterable[Row]) -> list[Row]:
    """Result rows that say how their mask was chosen."""
    return [row for row in rows if row.get("way")]


def _label(way: str) -> str:
    return MASK_WAYS[way].label if way in MASK_WAYS else way


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def mask_table(results: Iterable[Row], correlations: Iterable[Row], differences: Iterable[Row]) -> pd.DataFrame:
    """One row per way, k and sharing: held-out correlation, LDS, and its difference from a random mask.

    Args:
        results: result rows with ``way``, ``k``, ``shared`` and ``lds``, one per seed.
        correlations: rows with ``way``, ``k`` and ``correlation``, one per seed.
        differences: rows with ``way``, ``k``, ``shared``, ``mean`` and ``interval``.
    """
    import pandas as pd

    groups: dict[tuple[str, int, bool], list[float]] = {}
    for row in mask_rows(results):
        groups.setdefault((row["way"], row["k"], row["shared"]), []).append(float(row["lds"]["mean"]))
    known: dict[tuple[str, int], list[float]] = {}
    for row in correlations:
        known.setdefault((row["way"], row["k"]), []).append(float(row["correlation"]))
    gains = {(row["way"], row["k"], row["shared"]): row for row in differences}
    records = []
    order = list(MASK_WAYS)
    for (way, k, shared), values in sorted(
        groups.items(), key=lambda item: (item[0][2], item[0][1], order.index(item[0][0]))
    ):
        gain = gains.get((way, k, shared))
        own = known.get((way, k))
        records.append(
            {
                "Chosen by": _label(way),
                "k": k,
                "Masks": "one for all" if shared else "one per network",
                "Correlation": _mean(own) if own else None,
                "LDS": _mean(values),
                "Minus random": "" if gain is None else f"{gain['mean']:+.4f}",
                "95 % interval": "" if gain is None else _signed_interval(gain["interval"]),
                "Seeds": len(values),
            }
        )
    return with_formats(pd.DataFrame(records), {"Correlation": "{:.3f}", "LDS": "{:.4f}"})


def _signed_interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def layer_mask_table(kept: Iterable[Row]) -> pd.DataFrame:
    """One row per size of a layer's masks: held-out correlations of the masks used, of energy masks and of random ones.

    Args:
        kept: rows with ``stage``, ``method``, ``held_out``, ``energy`` and ``random``.
    """
    import pandas as pd

    names = {"held_out": "These masks", "energy": "By energy", "random": "Random"}
    records = [
        {"Masks": row["stage"], "Chosen by": row["method"], **{label: row[name] for name, label in names.items()}}
        for row in kept
    ]
    return with_formats(pd.DataFrame(records), dict.fromkeys(names.values(), "{:.3f}"))


def cost_table(fits: Iterable[Row]) -> pd.DataFrame:
    """Seconds of fitting one mask.

    Args:
        fits: rows with ``way``, ``k`` and ``seconds``, one per mask.
    """
    import pandas as pd

    groups: dict[tuple[str, int], list[float]] = {}
    for row in fits:
        groups.setdefault((row["way"], row["k"]), []).append(float(row["seconds"]))
    records = [
        {
            "Chosen by": _label(way),
            "k": k,
            "Seconds, median": statistics.median(values),
            "Lowest to highest": f"{seconds_text(min(values))} to {seconds_text(max(values))}",
            "Masks": len(values),
        }
        for (way, k), values in groups.items()
    ]
    return with_formats(pd.DataFrame(records), {"Seconds, median": seconds_text})


def share_table(shares: Mapping[str, Mapping[str, Sequence[int]]]) -> pd.DataFrame:
    """Share of each weight's coordinates that is kept.

    Args:
        shares: ``{way: {weight: (kept, size)}}``.
    """
    import pandas as pd

    names = list(next(iter(shares.values())))
    records = []
    for name in names:
        size = next(iter(shares.values()))[name][1]
        record: dict[str, Any] = {"Weight": name, "Coordinates": f"{size:,}"}
        record |= {_label(way): f"{own[name][0] / size:.2%}" for way, own in shares.items()}
        records.append(record)
    return pd.DataFrame(records)


def correlation_figure(rows: Sequence[Row], *, title: str = "") -> Figure:
    """Held-out correlation of full and masked inner products against k, a dot per seed, a line through the means.

    Args:
        rows: rows with ``way``, ``k`` and ``correlation``.
        title: title above the axes.
    """
    import matplotlib.pyplot as plt

    with figure_style():
        figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
        for way, style in MASK_WAYS.items():
            own = [row for row in rows if row["way"] == way]
            if not own:
                continue
            ks = sorted({row["k"] for row in own})
            values = {k: [row["correlation"] for row in own if row["k"] == k] for k in ks}
            axes.plot(ks, [_mean(values[k]) for k in ks], color=style.colour, marker=style.marker, label=style.label)
            for k in ks:
                axes.plot([k] * len(values[k]), values[k], color=style.colour, marker=".", linestyle="", markersize=4)
        _k_axis(axes, sorted({row["k"] for row in rows}))
        axes.set_ylabel("Spearman correlation, mean over queries")
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9.5)
        plt.close(figure)
    return figure


def difference_figure(differences: Sequence[Row], *, title: str = "") -> Figure:
    """LDS minus that of a random mask against k, with 95 % intervals; one panel per kind of sharing.

    Args:
        differences: rows with ``way``, ``k``, ``shared``, ``mean`` and ``interval``.
        title: title above the panels.
    """
    import matplotlib.pyplot as plt

    kinds = [shared for shared in SHARING if any(row["shared"] is shared for row in differences)]
    ways = [way for way in MASK_WAYS if any(row["way"] == way for row in differences)]
    with figure_style():
        figure, panels = plt.subplots(
            1, len(kinds), figsize=(7.2, 3.8), layout="constrained", sharey=True, squeeze=False
        )
        for axes, shared in zip(panels[0], kinds, strict=True):
            for place, way in enumerate(ways):
                style = MASK_WAYS[way]
                own = sorted(
                    (row for row in differences if row["way"] == way and row["shared"] is shared),
                    key=lambda row: row["k"],
                )
                shift = 2 ** (0.09 * (place - (len(ways) - 1) / 2))
                means = [row["mean"] for row in own]
                axes.errorbar(
                    [row["k"] * shift for row in own],
                    means,
                    yerr=[
                        [mean - row["interval"][0] for mean, row in zip(means, own, strict=True)],
                        [row["interval"][1] - mean for mean, row in zip(means, own, strict=True)],
                    ],
                    color=style.colour,
                    marker=style.marker,
                    linestyle="",
                    elinewidth=1.4,
                    capsize=3,
                    label=style.label,
                )
            axes.axhline(0.0, color=NEUTRAL, linewidth=1.2)
            _k_axis(axes, sorted({row["k"] for row in differences}))
            axes.set_title(SHARING[shared], fontsize=10)
        panels[0][0].set_ylabel("LDS minus that of a random mask")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9.5)
        if title:
            figure.suptitle(title, color=NEUTRAL, fontsize=11.5, fontweight="bold")
        plt.close(figure)
    return figure


def pixel_figure(counts: Mapping[str, np.ndarray], *, k: int, title: str = "") -> Figure:
    """For each way, how many of the first layer's weights are kept at each pixel.

    Args:
        counts: ``{way: (height, width)}``; one scale of colours for all.
        k: coordinates that each mask keeps in all layers together.
        title: title above the panels.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    highest = max(1.0, *(float(np.max(image)) for image in counts.values()))
    with figure_style():
        figure, panels = plt.subplots(
            1, len(counts), figsize=(1.75 * len(counts) + 0.9, 2.7), layout="constrained", squeeze=False
        )
        for axes, (way, image) in zip(panels[0], counts.items(), strict=True):
            axes.imshow(np.asarray(image), cmap="viridis", vmin=0, vmax=highest, interpolation="nearest")
            axes.set_title(_label(way).replace(", ", ",\n"), fontsize=9.5)
            axes.set_xlabel(f"{int(np.sum(image)):,} of {k:,}", fontsize=9.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
        bar = figure.colorbar(panels[0][0].images[0], ax=panels[0].tolist(), shrink=0.8, label="kept weights a pixel")
        bar.outline.set_edgecolor(NEUTRAL)  # pyright: ignore[reportCallIssue]
        if title:
            figure.suptitle(title, color=NEUTRAL, fontsize=11.5, fontweight="bold")
        plt.close(figure)
    return figure


def draw(record: RunRecord, title: str) -> dict[str, Figure]:
    """Figures of a run's record, by kind.

    Args:
        record: of a run that compared masks.
        title: title above them.
    """
    import numpy as np

    largest = max(int(row["k"]) for row in mask_rows(record.results))
    pixels = {way: np.asarray(image) for way, image in record.extra["pixels"].items()}
    return {
        "correlation": correlation_figure(record.extra["correlations"], title=title),
        "lds_difference": difference_figure(record.extra["differences"], title=title),
        "pixels": pixel_figure(pixels, k=largest, title=title),
    }


def _k_axis(axes: Axes, ks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [f"{k:,}" for k in ks])
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.set_xlabel("k, kept coordinates")
