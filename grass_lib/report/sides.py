"""On which side of the published values ours lie: masks, masks with a projection behind them, projections alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_KINDS = ("masks", "masks with a projection behind them", "projections of the whole gradient")


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
    for title in _KINDS:
        values = [row["measured"] - row["published"] for row in measured if _kind(row) == title]
        if values:
            above = sum(value > 0 for value in values)
            mean = sum(values) / len(values)
            parts.append(
                f"of {len(values)} {title}, {above} are above the published value and {len(values) - above} below "
                f"({_signed(mean)} on average)"
            )
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + ".\n"


def _signed(value: float) -> str:
    """Three digits, or four where three would show nothing of it."""
    digits = 4 if round(value, 4) and not round(value, 3) else 3
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # no negative zero


def _kind(row: Mapping[str, Any]) -> str:
    if "mask" in row["projection"]:
        return _KINDS[0]
    return _KINDS[1] if "mask" in row["sparsification"] else _KINDS[2]
