"""How long FactGraSS compresses beside LoGra, here and as published: ratios within one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grass_lib.report.record import RunRecord

EXPERIMENT = "gpt2_wikitext"


def factored_seconds_sentence(rows: Iterable[Mapping[str, Any]], records: Iterable[RunRecord]) -> str:
    """Seconds of FactGraSS over those of LoGra at the same k, and how much of a pass they are.

    Args:
        rows: Of the ledger.
        records: Those that its values come from.

    Returns:
        Sentences in Markdown; empty where the two were not measured in one run.
    """
    seconds = [row for row in rows if row["experiment"] == EXPERIMENT and row["metric"] == "projection_seconds"]
    found: dict[str, dict[int, Mapping[str, Any]]] = {"logra": {}, "factgrass": {}}
    for row in seconds:
        kind = _kind(row)
        if kind and row["measured"] is not None:
            found[kind][row["k"]] = row
    ks = [k for k, row in found["factgrass"].items() if row["run_id"] == found["logra"].get(k, {}).get("run_id")]
    if not ks:
        return ""
    pairs = [(found["factgrass"][k], found["logra"][k]) for k in sorted(ks)]
    here, theirs = (_range([one[key] / other[key] for one, other in pairs]) for key in ("measured", "published"))
    text = (
        f"For GPT-2 small, FactGraSS takes {here} times as long as LoGra to compress here, {theirs} times as published"
    )
    run = next((record for record in records if record.run_id == pairs[0][0]["run_id"]), None)
    passes = [row["seconds"]["gradients"] for row in run.results if row.get("seconds")] if run else []
    if passes:
        slowest = max(row["measured"] for pair in pairs for row in pair)
        dearest = max(other["measured"] for _, other in pairs)
        text += (
            f". LoGra's products with small matrices are cheap on this device, at most {dearest:.2f} s; forward and "
            f"backward passes take {max(passes):.1f} s, and none of these compressions more than {slowest:.2f} s"
        )
    own = [one["measured"] for one, _ in pairs]
    if own[0] > own[-1]:
        text += (
            f". FactGraSS's seconds fall from {own[0]:.2f} at k = {min(ks):,} to {own[-1]:.2f} at k = {max(ks):,}, "
            "though its work grows: the first ones hold something else, such as a kernel's first use, which was not "
            f"measured apart. At the largest k the ratio is {own[-1] / pairs[-1][1]['measured']:.2f}"
        )
    return f"{text}.\n"


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def _kind(row: Mapping[str, Any]) -> str:
    first, second = row["sparsification"], row["projection"]
    if first.startswith("normal") and second == "identity":
        return "logra"
    return "factgrass" if first.startswith("random_mask") and second.startswith("sjlt") else ""
