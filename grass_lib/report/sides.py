"""On which side of the published values ours lie: compressions with a mask, and those of the whole gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def sides_sentence(rows: Iterable[Mapping[str, Any]], experiment: str) -> str:
    """Counts of LDS values above and below the published ones.

    Args:
        rows: Of the ledger.
        experiment: Whose.

    Returns:
        A sentence in Markdown.
    """
    found = [row for row in rows if row["experiment"] == experiment and row["metric"] == "lds"]
    measured = [row for row in found if row["measured"] is not None and row["verdict"] != "not comparable"]
    if not measured:
        return "Nothing is measured yet that can be compared.\n"
    parts = []
    for title, masked in (("compressions with a mask", True), ("projections of the whole gradient", False)):
        values = [row["measured"] - row["published"] for row in measured if _has_mask(row) == masked]
        if values:
            above = sum(value > 0 for value in values)
            mean = sum(values) / len(values)
            parts.append(
                f"of {len(values)} {title}, {above} are above the published value and {len(values) - above} below "
                f"({mean:+.3f} on average)"
            )
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + ".\n"


def _has_mask(row: Mapping[str, Any]) -> bool:
    return "mask" in row["sparsification"] or "mask" in row["projection"]
