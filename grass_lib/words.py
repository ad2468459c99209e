"""Lists and comparisons in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def few(names: Sequence[object], most: int = 5) -> str:
    """Names or numbers with commas between them, not too many.

    Args:
        names: What is listed.
        most: How many are written out.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more


def faster(percent: float, than: str = "") -> str:
    """A difference of two speeds: "134 % faster than LoGra", "12 % slower than LoGra", "as fast as LoGra".

    Args:
        percent: By how much the first is higher; below zero where it is lower.
        than: What the second is of; left out where it is empty.
    """
    rounded = f"{abs(percent):.0f}"
    if rounded == "0":
        return f"as fast as {than}" if than else "as fast"
    return f"{rounded} % {'faster' if percent > 0 else 'slower'}" + (f" than {than}" if than else "")
