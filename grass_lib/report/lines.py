"""Lines of one method in a figure: one for each mask before its projection, and what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grass_lib.report.style import METHODS, method_label
from grass_lib.report.tables import Row


@dataclass(frozen=True)
class LineLook:
    """How one line of a method is drawn; colour and marker are the method's.

    Attributes:
        dash: matplotlib's line style of measured values.
        published: that of published ones.
        size: of the marker, times the usual one.
    """

    dash: str
    published: str
    size: float


#: In the order of the masks of one method, small ones first: a larger mask has a larger marker.
LOOKS = (LineLook("-", "--", 0.8), LineLook("-.", ":", 1.3), LineLook("--", "-.", 1.6))
#: Of a method's only line.
ONLY = LineLook("-", "--", 1.0)
#: Line styles of matplotlib in plotly's vocabulary.
PLOTLY_DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}


def line_key(row: Row) -> str:
    """What tells two lines of one method apart: the flat mask before the projection."""
    first = str(row["sparsification"])
    return "" if first == "identity" or "*" in first else first


def line_keys(group: Sequence[Row]) -> list[str]:
    """The keys of all lines of one method, small masks first.

    Args:
        group: rows of one method.
    """
    return sorted({line_key(row) for row in group}, key=lambda key: (_size(key), key))


def line_look(key: str, keys: Sequence[str]) -> LineLook:
    """The look of a line, the same for measured and published rows of one mask.

    Args:
        key: of the line.
        keys: of all lines of the method.
    """
    return LOOKS[keys.index(key) % len(LOOKS)] if len(keys) > 1 else ONLY


def lines(group: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The lines of one method.

    Args:
        group: rows of one method, sorted by k.

    Returns:
        Label and rows of each line, small masks first; where there are several, the label has the number of kept
        coordinates.
    """
    label = method_label(group[0]["sparsification"], group[0]["projection"])
    keys = line_keys(group)
    if len(keys) == 1:
        return [(label, list(group))]
    return [
        (f"{label}, {_size(key):,} kept" if key else label, [row for row in group if line_key(row) == key])
        for key in keys
    ]


def aside(name: str, names: Sequence[str], turn: int = 0) -> float:
    """Factor of k that puts the markers and bars of the methods side by side.

    Args:
        name: a key of `METHODS`.
        names: all methods of the figure.
        turn: place of the line within its method.
    """
    drawn = [method for method in METHODS if method in names]
    return 2 ** (0.05 * (drawn.index(name) - (len(drawn) - 1) / 2) + 0.02 * turn)


def _size(key: str) -> int:
    return int(key.rpartition("-")[2]) if key else 0
