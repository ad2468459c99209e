"""Tables of a run: LDS with its interval, projection time with its ratio, as data frames and as sortable HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grass_lib.errors import UsageError
from grass_lib.report.style import ATTRIBUTOR_TITLES, METHODS, is_factored, method_label, method_of, stage_text

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML

    from grass_lib.report.record import RunRecord

Row = Mapping[str, Any]
#: How numbers are written: a format string or a function.
Form = str | Callable[[float], str]

_LAYOUT = {"topStart": "info", "topEnd": "search", "bottomStart": "pageLength", "bottomEnd": "paging"}


def result_rows(source: RunRecord | Iterable[Row]) -> list[Row]:
    """Result rows of a record, or the rows themselves.

    Args:
        source: a run record, or result rows as `Run.result` takes them.

    Returns:
        The rows as a list.
    """
    rows: Any = getattr(source, "results", source)
    return list(rows)


def pick_rows(
    source: RunRecord | Iterable[Row], *, attributor: str | None = None, convention: str | None = None
) -> list[Row]:
    """Rows that belong in one figure: one attributor, one damping convention.

    Args:
        source: a run record or result rows.
        attributor: which attributor; None takes that of the first row.
        convention: ``relative`` or ``paper``; None takes that of the first row of the attributor, so that a run which
            reports both is drawn once.

    Returns:
        The rows in their order.
    """
    rows = result_rows(source)
    if attributor is None and rows:
        attributor = rows[0]["attributor"]
    rows = [row for row in rows if row["attributor"] == attributor]
    if convention is None and rows:
        convention = rows[0].get("damping_convention")
    return [row for row in rows if convention is None or row.get("damping_convention") in (None, convention)]


def k_name(rows: Iterable[Row]) -> str:
    """``k per layer`` where all rows are factored, else ``k``."""
    factored = {is_factored(row["sparsification"]) for row in rows}
    return "k per layer" if factored == {True} else "k"


def method_columns(row: Row, k: str = "k") -> dict[str, Any]:
    """The columns that every table starts with: method and k.

    Args:
        row: a result row.
        k: heading of the second one.

    Returns:
        Cell by heading.
    """
    return {
        "Method": method_label(row["sparsification"], row["projection"]),
        k: row.get("k"),
    }


def row_order(row: Row) -> tuple[int, int, int]:
    """Sorting key of result rows: attributor, method, k."""
    attributors, methods = list(ATTRIBUTOR_TITLES), list(METHODS)
    place = attributors.index(row["attributor"]) if row["attributor"] in attributors else len(attributors)
    return place, methods.index(method_of(row["sparsification"], row["projection"])), row.get("k") or 0


def interval_text(interval: Sequence[float] | None, digits: int = 3) -> str:
    """An interval as ``0.401 to 0.432``, or nothing where there is none."""
    if interval is None or any(bound is None or bound != bound for bound in interval):
        return ""
    low, high = interval
    return f"{low:.{digits}f} to {high:.{digits}f}"


def seconds_text(seconds: float) -> str:
    """Seconds, or a bound of their interval: three digits, large numbers in full."""
    return f"{seconds:,.0f}" if seconds >= 99.95 else f"{seconds:#.3g}"


def damping_text(row: Row) -> str:
    """The damping of a result row; ``edge`` where it was the smallest or largest value that was tried.

    Args:
        row: a result row.
    """
    damping = row.get("damping")
    if damping is None:
        return ""
    return f"{damping:g}, edge" if row.get("damping_at_edge") else f"{damping:g}"


def lds_table(source: RunRecord | Iterable[Row]) -> pd.DataFrame:
    """LDS of every attributor and compression with the 95 % interval and the chosen damping (see `damping_text`).

    Args:
        source: a run record or result rows.

    Returns:
        One row per result, ordered by attributor, method and k; no column of attributors where there is only one.
    """
    import pandas as pd

    rows = sorted((row for row in result_rows(source) if row.get("lds")), key=row_order)
    several = len({row.get("damping_convention") for row in rows} - {None}) > 1
    k = k_name(rows)
    records = []
    for row in rows:
        lds = row["lds"]
        record = {"Attributor": ATTRIBUTOR_TITLES.get(row["attributor"], row["attributor"]), **method_columns(row, k)}
        record |= {"LDS": float(lds["mean"]), "95 % interval": interval_text(lds.get("interval"), 4)}
        record["Damping"] = damping_text(row)
        if several:
            record["Convention"] = row.get("damping_convention") or ""
        # The widest column comes last: on a narrow screen the numbers are what should be seen first.
        record["Compression"] = stage_text(row["sparsification"], row["projection"])
        records.append(record)
    frame = pd.DataFrame(records)
    if len({row["attributor"] for row in rows}) == 1:
        frame = frame.drop(columns="Attributor")
    return with_formats(frame, {"LDS": "{:.4f}"})


def seconds_ratios(rows: Iterable[Row], reference: str) -> dict[str, float]:
    """Projection seconds divided by those of one method at the same k.

    Args:
        rows: result rows or published rows.
        reference: method whose time is 1 at each k.

    Returns:
        Ratio by compression as `stage_text` writes it; only where the reference was run at that k.
    """
    timed = [row for row in rows if row.get("projection_seconds") is not None]
    base: dict[Any, float] = {}
    for row in timed:
        if method_of(row["sparsification"], row["projection"]) != reference or row["projection_seconds"] <= 0:
            continue
        # A variant such as sjlt_4 stands in only where the plain type was not run.
        if row.get("k") not in base or stage_text(row["sparsification"], row["projection"]).startswith(f"{reference}-"):
            base[row.get("k")] = float(row["projection_seconds"])
    return {
        stage_text(row["sparsification"], row["projection"]): float(row["projection_seconds"]) / base[row.get("k")]
        for row in timed
        if row.get("k") in base
    }


def time_table(
    source: RunRecord | Iterable[Row], *, reference: str | None = None, published: Iterable[Row] = ()
) -> pd.DataFrame:
    """Seconds spent in projection and their ratio to one method at the same k.

    Args:
        source: a run record or result rows; a compression that appears twice (two damping conventions) is shown once.
        reference: method whose time is 1 at each k; None takes LoGra where all rows are factored, else SJLT.
        published: rows of ``published.json``, for a column with the published ratios; only for a paper-scale run.

    Returns:
        One row per compression, ordered by method and k; no ratio where the reference was not run at that k.
    """
    import pandas as pd

    unique: dict[str, Row] = {}
    for row in result_rows(source):
        if row.get("projection_seconds") is not None:
            unique.setdefault(stage_text(row["sparsification"], row["projection"]), row)
    rows = sorted(unique.values(), key=lambda row: row_order({**row, "attributor": ""}))
    k = k_name(rows)
    factored = k != "k"
    reference = reference or ("normal" if factored else "sjlt")
    heading = "Times " + ("LoGra" if factored and reference == "normal" else METHODS[reference].label)
    ours, theirs = seconds_ratios(rows, reference), seconds_ratios(published, reference)
    records = []
    for row in rows:
        compression = stage_text(row["sparsification"], row["projection"])
        record = {**method_columns(row, k), "Seconds": float(row["projection_seconds"])}
        if any(other.get("projection_seconds_interval") for other in rows):
            bounds = row.get("projection_seconds_interval")
            record["95 % interval"] = " to ".join(map(seconds_text, bounds)) if bounds else ""
        record[heading] = ours.get(compression)
        if theirs:
            record["As published"] = theirs.get(compression)
        records.append({**record, "Backend": row.get("backend") or "", "Compression": compression})
    return with_formats(pd.DataFrame(records), {"Seconds": seconds_text, heading: "{:.2f}", "As published": "{:.2f}"})


def with_formats(frame: pd.DataFrame, formats: Mapping[str, Form]) -> pd.DataFrame:
    """Says how `table_html` writes the numbers of a frame; the frame keeps the numbers themselves.

    Args:
        frame: any frame.
        formats: format string, such as ``{:.4f}``, or function by column name.

    Returns:
        The same frame.
    """
    frame.attrs["formats"] = dict(formats)
    return frame


def _as_text(frame: pd.DataFrame) -> pd.DataFrame:
    shown = frame.copy()
    for name, form in frame.attrs.get("formats", {}).items():
        if name in shown:
            write = form if callable(form) else form.format
            shown[name] = [
                "" if value is None or value != value else value if isinstance(value, str) else write(value)
                for value in shown[name]
            ]
    return shown


def table_html(
    frame: pd.DataFrame,
    table_id: str,
    *,
    caption: str | None = None,
    page_length: int = 25,
    embed: bool = False,
    allow_html: bool = False,
    **options: Any,
) -> str:
    """A sortable, searchable table as HTML that loads nothing from the network.

    Args:
        frame: what to show; the index is left out.
        table_id: HTML id; starts with ``dt-`` so that it never meets the id of a section.
        caption: caption below the table.
        page_length: rows per page.
        embed: put the table's script (0.9 MB) into the result. False in a book, which loads it once; True for a
            notebook opened by hand.
        allow_html: whether cells hold trusted HTML.
        **options: more options of DataTables.

    Returns:
        An HTML fragment; without JavaScript it shows a plain table.

    Raises:
        UsageError: the id does not start with ``dt-``.
    """
    from itables.javascript import generate_init_offline_itables_html, to_html_datatable
    from itables.utils import find_package_file

    if not table_id.startswith("dt-"):
        raise UsageError(f"table_id must start with 'dt-', got {table_id!r}; a section may have the same id otherwise")
    settings: dict[str, Any] = {
        "connected": False,
        "classes": "display compact",
        "style": "width:100%;margin:0;caption-side:bottom",
        "layout": _LAYOUT,
        "pageLength": page_length,
        "lengthMenu": sorted({10, page_length, 50, 250}),
        "showIndex": False,
        "autoWidth": False,
        "text_in_header_can_be_selected": False,  # so that a click anywhere on a head sorts
        "maxBytes": 0,
        "display_logo_when_loading": False,
        "allow_html": allow_html,
        "columnDefs": [{"targets": "_all", "className": "dt-left"}],
        **options,
    }
    body = to_html_datatable(_as_text(frame), caption, table_id=table_id, **settings)
    script = generate_init_offline_itables_html(find_package_file("html/dt_bundle.js")) if embed else ""
    return f'{script}<div class="grass-table">{body}</div>'


def show_table(frame: pd.DataFrame, table_id: str, **options: Any) -> HTML:
    """The table of `table_html` as the last value of a notebook cell.

    Args:
        frame: what to show.
        table_id: HTML id, starting with ``dt-``.
        **options: see `table_html`.

    Returns:
        An IPython HTML object.
    """
    from IPython.display import HTML

    return HTML(table_html(frame, table_id, **options))


def badge(text: str, kind: str) -> str:
    """A coloured word for a table cell: the text says it, the colour only repeats it.

    Args:
        text: the word.
        kind: suffix of the CSS class ``verdict-...``.

    Returns:
        An HTML span.
    """
    return f'<span class="verdict verdict-{html.escape(kind)}">{html.escape(text)}</span>'
