"""Part of the page "Other systems: throughput and LDS": how well every system predicts retrained models."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.baselines.systems import SYSTEMS
from grass_lib.report.figure_files import figure_markdown
from grass_lib.report.figures import draw_record
from grass_lib.report.tables import Row, interval_text

if TYPE_CHECKING:
    from grass_lib.report.record import RunRecord

EXPERIMENT = "logix_comparison"


def systems_lds_markdown(records: Iterable[RunRecord], figures: Path) -> str:
    """LDS and agreement of all systems as MyST, with their figures; a note with the command where no run has them.

    Args:
        records: of paper scale.
        figures: ``book/_generated/figures``.
    """
    record = next((record for record in records if record.experiment == EXPERIMENT), None)
    rows = [] if record is None else [row for row in record.results if row.get("lds")]
    if record is None or not rows:
        return f"Not measured yet: `grass run {EXPERIMENT} --scale paper` does it, on a GPU, after `make baselines`.\n"
    best = _best_of_each(rows)
    first = rows[0]
    ceiling = (first.get("noise_ceiling") or {}).get("mean")
    lines = [
        f"Measured in run `{record.run_id}` on {record.device['name']}: GPT-2 small{_weights(record)}, data "
        f"{html.escape(record.data['source'], quote=False)}; {first['lds']['n_models']} models retrained on random "
        f"halves, {first['lds']['n_queries']} queries. Each system has random matrices of its own, and the damping "
        "that did best on other queries."
        + (f" What any method could reach at best is {ceiling:.3f}." if ceiling is not None else "")
        + f" {_versions(record)}",
        "",
        f"The best of each: {'; '.join(_text(row) for row in best)}.",
    ]
    agreement = record.extra.get("correlations")
    if agreement:
        lines += ["", _agreement_sentence(best, agreement)]
    drawn = {path.stem.rsplit("_", 1)[1]: path.name for path in draw_record(record, figures, ("svg",))}
    lines += [
        "",
        figure_markdown(drawn["lds"], "LDS of every system on the same retrained models, with 95 % intervals."),
    ]
    if "agreement" in drawn:
        caption = "Mean Spearman correlation over queries between the scores of all systems."
        lines += ["", figure_markdown(drawn["agreement"], caption)]
    return "\n".join(lines)


def _versions(record: RunRecord) -> str:
    found = [f"{SYSTEMS[name].title} {version}" for name, version in record.extra.get("system_versions", {}).items()]
    return f"{', '.join(found)}." if found else ""


def _weights(record: RunRecord) -> str:
    return " trained from scratch in place of the pretrained one" if record.extra.get("weights") == "substitute" else ""


def _best_of_each(rows: Sequence[Row]) -> list[Row]:
    """The row with the highest LDS of each system, in the order of the systems."""
    found: dict[str, Row] = {}
    for row in rows:
        now = found.get(row["system"])
        if now is None or row["lds"]["mean"] > now["lds"]["mean"]:
            found[row["system"]] = row
    return [found[name] for name in SYSTEMS if name in found]


def _text(row: Row) -> str:
    interval = interval_text(row["lds"].get("interval"))
    return f"{row['label']} {row['lds']['mean']:.3f}" + (f" ({interval})" if interval else "")


def _agreement_sentence(best: Sequence[Row], agreement: Mapping[str, Any]) -> str:
    """How far the scores of the compressed rows among the best agree."""
    places = [agreement["labels"].index(row["label"]) for row in best if row["k"] is not None]
    values = [agreement["matrix"][i][j] for i in places for j in places if i < j]
    if not values:
        return ""
    return (
        f"The scores of those that compress correlate by {min(values):.2f} to {max(values):.2f} with each other. Given "
        "the matrices of one of them, this library gives its scores, which the page of the run checks; so what is left "
        "between them is the kind of compression, and which random numbers they drew."
    )
