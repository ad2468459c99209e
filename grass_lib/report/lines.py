"""Lines of one method in a figure: one for each mask before its projection."""

from __future__ import annotations

from collections.abc import Sequence

from grass_lib.report.style import method_label
from grass_lib.report.tables import Row

_KINDS = {"random_mask": "random", "selective_mask": "selected"}


def line_key(row: Row) -> str:
    """What tells two lines of one method apart: the flat mask before the projection."""
    first = str(row["sparsification"])
    return "" if first == "identity" or "*" in first else first


def lines(group: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The lines of one method.

    Args:
        group: rows of one method, sorted by k.

    Returns:
        Label and rows of each line, small masks first; where there are several, the label has the number of kept
        coordinates, and how they were chosen if that differs too.
    """
    label = method_label(group[0]["sparsification"], group[0]["projection"])
    keys = sorted({line_key(row) for row in group}, key=lambda key: (_size(key), key))
    if len(keys) == 1:
        return [(label, list(group))]
    kinds = {key.rpartition("-")[0] for key in keys}
    found = []
    for key in keys:
        kind = _KINDS.get(key.rpartition("-")[0], "kept") if len(kinds) > 1 else "kept"
        name = f"{label}, {_size(key):,} {kind}" if key else label
        found.append((name, [row for row in group if line_key(row) == key]))
    return found


def _size(key: str) -> int:
    return int(key.rpartition("-")[2]) if key else 0
