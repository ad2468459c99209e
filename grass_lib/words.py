"""Lists in messages."""

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
