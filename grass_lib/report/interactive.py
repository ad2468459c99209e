"""Interactive figures (plotly) as HTML fragments that load nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grass_lib.errors import UsageError
from grass_lib.report.figures import comparable, k_title, series, with_counterpart
from grass_lib.report.lines import PLOTLY_DASHES, LineLook, aside, line_key, line_keys, line_look, lines
from grass_lib.report.style import METHODS, NEUTRAL, experiment_title, stage_text
from grass_lib.report.tables import Row, interval_text, pick_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from IPython.display import HTML

    from grass_lib.report.record import RunRecord

_CLEAR = "rgba(0,0,0,0)"
_GRID = "rgba(122,122,122,0.25)"
# Height of the plot (px) and of a row of the legend below it; on a narrow page each entry has a row.
_PLOT, _LEGEND_ROW = 370, 20
_MARKER = 10
# More lines than this cover each other: the published ones then wait for a click in the legend.
_MANY_LINES = 12


def _figure(y_title: str) -> go.Figure:
    import plotly.graph_objects as go

    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": NEUTRAL, "showline": True}
    figure = go.Figure()
    figure.update_layout(
        template="none",
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font={"color": NEUTRAL, "size": 13},
        margin={"l": 56, "r": 12, "t": 16, "b": 8},
        hoverlabel={"font": {"size": 13}},
        modebar={"bgcolor": _CLEAR, "color": NEUTRAL, "activecolor": NEUTRAL},
        # The axes end where the legend at the bottom begins.
        legend={
            **{"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
            **{"font": {"size": 12}, "itemsizing": "trace", "maxheight": 0.6},
        },
        xaxis={**axis, "type": "log", "title": {"text": "k, compressed dimension", "standoff": 6}, "automargin": True},
        yaxis={**axis, "title": {"text": y_title}, "automargin": True},
    )
    return figure


def _k_ticks(figure: go.Figure, rows: Sequence[Row]) -> None:
    values = sorted({row["k"] for row in rows})
    figure.update_xaxes(
        tickvals=values, ticktext=[f"{k:,}" for k in values], minor={"ticks": ""}, title={"text": k_title(rows)}
    )


def _hover(row: Row) -> str:
    text = stage_text(row["sparsification"], row["projection"])
    interval = interval_text(row["lds"].get("interval"))
    return f"{text}<br>95 % interval {interval}" if interval else text


def _trace(name: str, label: str, rows: list[Row], dash: str, look: LineLook, shift: float = 1.0) -> dict[str, Any]:
    """What measured and published lines have in common; `shift` multiplies k, so that markers stand side by side."""
    style = METHODS[name]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": label,
        "x": [row["k"] * shift for row in rows],
        "line": {"color": style.colour, "width": 2, "dash": PLOTLY_DASHES[dash]},
        "marker": {"symbol": style.symbol, "size": _MARKER * look.size, "color": style.colour},
    }


def _measured_trace(name: str, label: str, rows: list[Row], look: LineLook, shift: float) -> dict[str, Any]:
    means = [row["lds"]["mean"] for row in rows]
    bounds = [row["lds"].get("interval") or (mean, mean) for row, mean in zip(rows, means, strict=True)]
    return {
        **_trace(name, label, rows, look.dash, look, shift),
        "y": means,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(high - mean, 0.0) for mean, (_, high) in zip(means, bounds, strict=True)],
            "arrayminus": [max(mean - low, 0.0) for mean, (low, _) in zip(means, bounds, strict=True)],
            "thickness": 1.2,
        },
        "text": [_hover(row) for row in rows],
        "hovertemplate": "%{text}<br>LDS %{y:.3f}<extra></extra>",
    }


def _published_trace(name: str, label: str, rows: list[Row], look: LineLook, shift: float = 1.0) -> dict[str, Any]:
    trace = _trace(name, label, rows, look.published, look, shift)
    return {
        **trace,
        "y": [row["lds"] for row in rows],
        "line": {**trace["line"], "width": 1.2},
        "marker": {**trace["marker"], "symbol": f"{METHODS[name].symbol}-open"},
        "text": [stage_text(row["sparsification"], row["projection"]) for row in rows],
        "hovertemplate": "%{text}<br>published LDS %{y:.4f}<extra></extra>",
    }


def _published_key(shown: bool) -> dict[str, Any]:
    """The one entry of all published lines in the legend, grey; a click on it shows or hides them together."""
    return {
        **{"type": "scatter", "mode": "lines+markers", "x": [None], "y": [None]},
        "name": "published, hollow" if shown else "published, hollow (click to show)",
        "line": {"color": NEUTRAL, "width": 1.2, "dash": PLOTLY_DASHES["--"]},
        "marker": {"symbol": "circle-open", "size": _MARKER, "color": NEUTRAL},
    }


def _ceiling_trace(noise_ceiling: Mapping[str, Any], ks: Sequence[int]) -> dict[str, Any]:
    interval = interval_text(noise_ceiling.get("interval"))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": f"noise ceiling {noise_ceiling['mean']:.2f}",
        "x": [min(ks, default=1), max(ks, default=1)],
        "y": [noise_ceiling["mean"]] * 2,
        "line": {"color": NEUTRAL, "width": 2, "dash": "dot"},
        "text": [f"95 % interval {interval}" if interval else ""] * 2,
        "hovertemplate": "noise ceiling %{y:.3f}<br>%{text}<extra></extra>",
    }


def _fragment(figure: go.Figure, div_id: str, embed: bool) -> str:
    if not div_id.startswith("plotly-"):
        raise UsageError(f"div_id must start with 'plotly-', got {div_id!r}; a section may have the same id otherwise")
    traces: Any = figure.data
    entries = sum(trace.showlegend is not False and trace.visible is not False for trace in traces)
    figure.update_layout(height=_PLOT + _LEGEND_ROW * (entries + 3))
    body = figure.to_html(
        full_html=False,
        include_plotlyjs=embed,
        div_id=div_id,
        config={"responsive": True, "displaylogo": False, "modeBarButtons": [["toImage", "resetScale2d"]]},
        default_height=f"{figure.layout.height}px",
    )
    return f'<div class="grass-interactive">{body}</div>'


def lds_figure_html(
    source: RunRecord | Iterable[Row],
    *,
    div_id: str = "plotly-lds",
    published: Iterable[Row] = (),
    noise_ceiling: Mapping[str, Any] | None = None,
    attributor: str | None = None,
    convention: str | None = None,
    embed: bool = False,
) -> str:
    """LDS against k: hover for values and intervals, click a method in the legend to hide it.

    Published lines are hollow, in the colour of the measured line of the same compressions; they share one entry of the
    legend and wait for a click on it where there are many lines.

    Args:
        source: a run record or its result rows.
        div_id: HTML id; starts with ``plotly-``.
        published: rows of ``published.json`` to draw beside ours; only for a paper-scale run.
        noise_ceiling: ``{mean, interval}``; a dotted line, hidden until clicked in the legend if far above.
        attributor: which attributor's rows; None takes that of the first row.
        convention: which damping convention; None takes that of the first row.
        embed: put plotly.js (4.8 MB) into the result. False in a book, which loads it once; True for a notebook opened
            by hand.

    Returns:
        An HTML fragment.

    Raises:
        UsageError: the id does not start with ``plotly-``.
    """
    figure = _figure("LDS, mean over queries")
    groups = series(pick_rows(source, attributor=attributor, convention=convention), "lds")
    paper = with_counterpart(series(comparable(published), "lds"), groups)
    shown = [row for rows in (*groups.values(), *paper.values()) for row in rows]
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for name, group in groups.items():
        keys = line_keys(group)
        for label, rows in lines(group):
            key = line_key(rows[0])
            look, shift = line_look(key, keys), aside(name, list(groups), keys.index(key))
            ours.append(_measured_trace(name, label, rows, look, shift))
            same = [row for row in paper.get(name, ()) if line_key(row) == key]
            if same:
                theirs.append(_published_trace(name, f"{label}, published", same, look, shift))
    figure.add_traces(ours)
    if theirs:
        few = len(ours) + len(theirs) <= _MANY_LINES
        together = {"legendgroup": "published", "visible": True if few else "legendonly"}
        figure.add_trace({**_published_key(few), **together})
        figure.add_traces([{**trace, **together, "showlegend": False} for trace in theirs])
    if noise_ceiling is not None:
        drawn = [row["lds"]["mean"] for rows in groups.values() for row in rows]
        # A line far above the others would squeeze them: it waits in the legend.
        far = bool(drawn) and noise_ceiling["mean"] > max(drawn) + 1.5 * max(max(drawn) - min(drawn), 0.05)
        figure.add_trace(
            {**_ceiling_trace(noise_ceiling, [row["k"] for row in shown]), "visible": "legendonly" if far else True}
        )
    _k_ticks(figure, shown)
    return _fragment(figure, div_id, embed)


def show_lds_figure(source: RunRecord | Iterable[Row], **options: Any) -> HTML:
    """The figure of `lds_figure_html` as the last value of a notebook cell.

    Args:
        source: a run record or its result rows.
        **options: see `lds_figure_html`.

    Returns:
        An IPython HTML object.
    """
    from IPython.display import HTML

    return HTML(lds_figure_html(source, **options))


def published_figure_html(published: Iterable[Row], *, div_id: str = "plotly-published", embed: bool = False) -> str:
    """All published LDS values against k, one pair at a time, chosen from a menu.

    Rows that share a method but not the size of their mask are drawn as separate lines of one colour.

    Args:
        published: rows of ``published.json``.
        div_id: HTML id; starts with ``plotly-``.
        embed: as in `lds_figure_html`.

    Returns:
        An HTML fragment.
    """
    figure = _figure("LDS, published")
    rows = comparable(published)
    pairs = list(dict.fromkeys(row["experiment"] for row in rows))
    owner: list[str] = []
    for pair in pairs:
        for name, group in series([row for row in rows if row["experiment"] == pair], "lds").items():
            keys = line_keys(group)
            for label, line in lines(group):
                look = line_look(line_key(line[0]), keys)
                figure.add_trace({**_published_trace(name, label, line, look), "visible": pair == pairs[0]})
                owner.append(pair)
    figure.update_layout(
        margin={"t": 56},
        updatemenus=[
            {
                "type": "dropdown",
                "x": 0,
                "y": 1.1,
                "xanchor": "left",
                "yanchor": "top",
                "bgcolor": _CLEAR,
                "bordercolor": NEUTRAL,
                "buttons": [
                    {
                        "label": experiment_title(pair),
                        "method": "update",
                        "args": [{"visible": [name == pair for name in owner]}],
                    }
                    for pair in pairs
                ],
            }
        ],
    )
    _k_ticks(figure, rows)
    return _fragment(figure, div_id, embed)
