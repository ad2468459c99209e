"""Absolute against relative damping: what was published, and what the same choice gives here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grass_lib.report.matching import like_for_like
from grass_lib.report.published import published_rows
from grass_lib.report.schema import RunRecord
from grass_lib.report.style import experiment_title

Row = Mapping[str, Any]


def damping_table(records: Iterable[RunRecord]) -> str:
    """For each published row that was run with absolute damping: both dampings, and LDS in both conventions.

    Args:
        records: verified records, the best first; where several have a compression in one convention the first counts.

    Returns:
        MyST Markdown, a table for each pair; a note with the command where there is no such run.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for record in records:
        for row in record.results:
            if record.scale == "paper" and row["attributor"] == "trak" and row["lds"] is not None:
                found.setdefault((record.experiment, row["spec"], row["damping_convention"] or ""), row)
    parts = []
    for experiment in dict.fromkeys(row["experiment"] for row in published_rows()):
        lines = _lines(experiment, found)
        if lines:
            parts.append(_table(experiment, lines, found))
    if parts:
        return "\n".join(parts)
    return "Not run yet: `grass run mlp_mnist --scale paper -p convention=paper`.\n"


def _lines(experiment: str, found: Mapping[tuple[str, str, str], Row]) -> list[Row]:
    lines = []
    for row in published_rows(experiment):
        spec = row["projection"]
        if row["sparsification"] != "identity":
            spec = f"{row['sparsification']}->{row['projection']}"
        # Published fjlt was an unscaled dense Rademacher projection: its damping is in other units than any of ours.
        if like_for_like(row["projection"]) == row["projection"] and (experiment, spec, "paper") in found:
            lines.append({**row, "spec": spec})
    return lines


def _table(experiment: str, lines: list[Row], found: Mapping[tuple[str, str, str], Row]) -> str:
    same = 0
    body = []
    for line in lines:
        ours = found[experiment, line["spec"], "paper"]
        relative = found.get((experiment, line["spec"], "relative"))
        same += ours["damping"] == line["damping"]
        cells = [
            f"`{line['spec']}`",
            f"{line['damping']:g}",
            f"{ours['damping']:g}",
            f"{line['lds']:.4f}",
            f"{ours['lds']['mean']:.4f}",
            f"{relative['lds']['mean']:.4f}" if relative else "",
        ]
        body.append("| " + " | ".join(cells) + " |")
    head = (
        "| compression | damping, published | damping, chosen here | LDS, published | LDS, absolute | LDS, relative |\n"
        "| :--- | ---: | ---: | ---: | ---: | ---: |\n"
    )
    words = (
        f"**{experiment_title(experiment)}.** The same damping as published was chosen in {same} of {len(lines)} rows."
    )
    return f"{words}\n\n{head}" + "\n".join(body) + "\n"
