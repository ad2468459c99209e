"""Generated parts of the book's pages: the ledger's tables, numbers quoted in the prose, the overview of the pairs."""

from __future__ import annotations

import csv
import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.report.claims import THROUGHPUT
from grass_lib.report.pairs import PAIRS
from grass_lib.report.published import published_claims, published_rows, published_source
from grass_lib.report.style import experiment_title, method_label, method_of, reference_method, stage_text
from grass_lib.report.tables import Form, badge, interval_text, seconds_text, table_html, with_formats
from grass_lib.words import faster

if TYPE_CHECKING:
    import pandas as pd

LedgerRow = Mapping[str, Any]
VERDICTS = ("reproduced", "differs", "not comparable", "not run")


def _verdict_badge(verdict: str) -> str:
    return badge(verdict, verdict.replace(" ", "-"))


def _key(row: LedgerRow) -> tuple[Any, ...]:
    return row["experiment"], row["attributor"], row["sparsification"], row["projection"], row["k"]


def _common(row: LedgerRow) -> dict[str, Any]:
    if row["projection"] is None:  # a claim about a whole method, not about one compression
        return {"Pair": experiment_title(row["experiment"]), "Method": "FactGraSS", "Compression": "", "k": ""}
    return {
        "Pair": experiment_title(row["experiment"]),
        # Published under this name, made with a dense matrix: runs have a fast transform of that name as well.
        "Method": "FJLT (a dense Rademacher matrix)"
        if row["projection"].startswith("fjlt")
        else method_label(row["sparsification"], row["projection"]),
        "Compression": html.escape(stage_text(row["sparsification"], row["projection"])).replace(
            "-&gt;", " &rarr;<br>"
        ),
        "k": row["k"],
    }


def _percent(value: float | None) -> str:
    return "" if value is None else faster(value)


def _reason(row: LedgerRow) -> str:
    """The reason behind a click; the page's script shows it in a row below."""
    reason = str(row.get("reason") or "")
    return f"<details><summary>why</summary><div>{html.escape(reason)}</div></details>" if reason else ""


def lds_ledger(rows: Iterable[LedgerRow]) -> pd.DataFrame:
    """The LDS rows of the ledger and its throughput claim as a table for readers.

    Args:
        rows: ledger rows.

    Returns:
        One row per published LDS and one per claim, with trusted HTML in the verdict column.
    """
    import pandas as pd

    records = []
    for row in rows:
        if row["metric"] == "projection_seconds":
            continue
        is_lds = row["metric"] == "lds"
        published, measured = row.get("published"), row.get("measured")
        difference = measured - published if is_lds and measured is not None and published is not None else None
        record = _common(row) | {
            "Published": published if is_lds else _percent(published),
            "Measured": measured if is_lds else _percent(measured),
            "95 % interval": interval_text(row.get("interval"), 4),
            "Difference": None if difference is None else f"{difference:+.4f}",
            "Verdict": _verdict_badge(row["verdict"]),
            "Reason": _reason(row),
        }
        records.append(record)
    frame = pd.DataFrame(records, dtype=object).fillna("")
    return with_formats(frame, {"Published": "{:.4f}", "Measured": "{:.4f}"})


def _ratios(rows: Sequence[LedgerRow], field: str) -> dict[tuple[Any, ...], float]:
    """Seconds divided by those of the reference, SJLT alone or LoGra, at the same pair and k; ours within one run."""

    def group(row: LedgerRow) -> tuple[Any, ...]:
        return row["experiment"], row["k"], row["run_id"] if field == "measured" else None

    base = {
        group(row): float(row[field])
        for row in rows
        if row.get(field)
        and method_of(row["sparsification"], row["projection"]) == reference_method(row["sparsification"])
    }
    return {
        _key(row): float(row[field]) / base[group(row)]
        for row in rows
        if row.get(field) is not None and group(row) in base
    }


def seconds_ledger(rows: Iterable[LedgerRow]) -> pd.DataFrame:
    """The projection times of the ledger, as seconds and as ratios to SJLT, or LoGra, within one run.

    Args:
        rows: ledger rows.

    Returns:
        One row per published time.
    """
    import pandas as pd

    chosen = [row for row in rows if row["metric"] == "projection_seconds"]
    published, measured = _ratios(chosen, "published"), _ratios(chosen, "measured")
    records = []
    for row in chosen:
        key = _key(row)
        records.append(
            {
                **_common(row),
                "Published (s)": row["published"],
                "Ratio, published": published.get(key),
                "Measured (s)": row.get("measured"),
                "Ratio, measured": measured.get(key),
                "Verdict": _verdict_badge(row["verdict"]),
                "Reason": _reason(row),
            }
        )
    frame = pd.DataFrame(records, dtype=object).fillna("")
    formats: dict[str, Form] = dict.fromkeys(("Published (s)", "Measured (s)"), seconds_text)
    formats |= dict.fromkeys(("Ratio, published", "Ratio, measured"), "{:.2f}")
    return with_formats(frame, formats)


def _words(number: int) -> str:
    """A small number spelled out, as running text wants it."""
    names = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return names[number] if number < len(names) else str(number)


def substitutions(rows: Sequence[LedgerRow]) -> dict[str, str]:
    """Numbers that the prose quotes, by name.

    Args:
        rows: ledger rows.

    Returns:
        Text by name, ready for MyST substitution.
    """
    lds = [row for row in rows if row["metric"] == "lds"]
    counts = Counter(row["verdict"] for row in lds)
    published = published_rows()
    seconds = {
        method_of(row["sparsification"], row["projection"]): row["projection_seconds"]
        for row in published
        if row["experiment"] == "mlp_mnist" and row["k"] == 8192
    }
    values = {
        "n_published": str(len(published)),
        "n_pairs": _words(len(PAIRS)),
        "n_pairs_with_lds": _words(len({row["experiment"] for row in published})).capitalize(),
        "published_source": published_source(),
        "throughput_claim": published_claims()[0]["claim"],
        "throughput_protocol": published_claims()[0]["protocol"],
        "throughput_outcome": _claim_outcome(rows, published_claims()[0]["experiment"]),
        "published_dense_over_sjlt": f"{seconds['normal'] / seconds['sjlt']:.0f}",
        "mlp_parameters": f"{PAIRS[0].parameters:,}",
        "n_measured": str(sum(row.get("measured") is not None for row in lds)),
    }
    return values | {f"n_{name.replace(' ', '_')}": str(counts[name]) for name in VERDICTS}


def _claim_outcome(rows: Sequence[LedgerRow], pair: str) -> str:
    """A claim on throughput and what came out of it."""
    claim = next((row for row in rows if row["experiment"] == pair and row["metric"] == THROUGHPUT), None)
    if claim is None:
        return "not in the ledger"
    here = "not measured" if claim["measured"] is None else f"{faster(claim['measured'])} here, {claim['verdict']}"
    return f"up to {faster(claim['published'], 'LoGra')}; {here}"


def verdict_table(rows: Sequence[LedgerRow]) -> str:
    """How many published LDS values of each pair have which verdict, as a Markdown table.

    Args:
        rows: ledger rows.

    Returns:
        MyST Markdown.
    """
    lines = ["| pair | published LDS values | " + " | ".join(VERDICTS) + " |", "| --- " * (2 + len(VERDICTS)) + "|"]
    for pair in PAIRS:
        counts = Counter(row["verdict"] for row in rows if row["experiment"] == pair.name and row["metric"] == "lds")
        cells = [str(counts[name]) for name in VERDICTS] if counts else [""] * len(VERDICTS)
        total = str(sum(counts.values())) if counts else f"none; a claim: {_claim_outcome(rows, pair.name)}"
        lines.append(f"| {experiment_title(pair.name)} | {total} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pair_sections(rows: Sequence[LedgerRow], shown: Mapping[str, Sequence[str]]) -> str:
    """One section per pair: model, data, protocol and status.

    Args:
        rows: ledger rows.
        shown: for a pair that has pages, their document names relative to ``book/``.

    Returns:
        MyST Markdown.
    """
    parts = []
    for pair in PAIRS:
        counts = Counter(row["verdict"] for row in rows if row["experiment"] == pair.name and row["metric"] == "lds")
        total = sum(counts.values())
        measured, apart = total - counts["not run"], counts["not comparable"]
        if total:
            published = f"{total} published LDS values, {_words(measured)} of them with a measurement beside"
            if apart:
                which = "all" if apart == measured else _words(apart)
                published += f", {which} on other data or weights than the paper's"
        else:
            published = f"one published claim, on throughput: {_claim_outcome(rows, pair.name)} ({{doc}}`systems`)"
        links = ", ".join(f"{{doc}}`{doc}`" for doc in shown.get(pair.name, ()))
        status = f"Pages: {links}." if links else "No page yet: its published values are in the ledger as *not run*."
        if not links and not total:
            status = "No page yet: the claim is in the ledger as *not run*."
        parts += [
            f"## {experiment_title(pair.name)}",
            "",
            f"Model\n: {pair.model}, {pair.parameters:,} parameters",
            "",
            f"Data\n: {pair.data} {{cite:p}}`{pair.cited}`",
            "",
            f"Attribution\n: {pair.attribution}",
            "",
            f"Status\n: {published}. {status}",
            "",
        ]
    return "\n".join(parts)


def _filterable(frame: pd.DataFrame, table_id: str, page_length: int) -> str:
    """A table whose columns of names have a menu to filter by value; every column sorts."""
    menus = [place for place, name in enumerate(frame.columns) if name in ("Pair", "Method", "Verdict")]
    return table_html(
        frame,
        table_id,
        page_length=page_length,
        allow_html=True,
        columnDefs=[
            {"targets": "_all", "className": "dt-left"},
            {"targets": menus, "columnControl": [["searchList"]]},
        ],
    )


def write_ledger(rows: Sequence[LedgerRow], folder: Path) -> None:
    """Writes the ledger as HTML tables, CSV and JSON.

    Args:
        rows: ledger rows.
        folder: ``book/_generated``.
    """
    main = _filterable(lds_ledger(rows), "dt-ledger", page_length=25)
    times = _filterable(seconds_ledger(rows), "dt-ledger-seconds", page_length=10)
    (folder / "ledger.html").write_text(main + "\n", encoding="utf-8")
    (folder / "ledger_seconds.html").write_text(times + "\n", encoding="utf-8")
    (folder / "ledger.json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    fields = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "ledger.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
