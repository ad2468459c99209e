"""Files of figures, and what a page of the book writes to show one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.report.style import figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
# Nothing that changes from one day or version to the next goes into the files.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


def save_figure(figure: Figure, stem: str, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Writes a figure as PNG, SVG and PDF (or some of them), the same bytes each time.

    Args:
        figure: the figure.
        stem: file name without suffix.
        folder: where to write; made when missing.
        formats: suffixes to write.

    Returns:
        The paths, in the order of the formats.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    with figure_style():
        for suffix in formats:
            path = target / f"{stem}.{suffix}"
            figure.savefig(path, dpi=200, metadata=_METADATA[suffix], bbox_inches="tight", transparent=True)
            paths.append(path)
    return paths


def figure_markdown(name: str, caption: str, *, alt: str = "", options: Sequence[str] = ()) -> str:
    """A generated figure for a page of the book; on a narrow page it keeps a width at which it can be read.

    Args:
        name: file below ``book/_generated/figures/``.
        caption: below the figure.
        alt: what it shows in a few words; the caption where there are none.
        options: more lines such as ``:name: fig-headline``.

    Returns:
        MyST Markdown.
    """
    lines = [f"```{{figure}} /book/_generated/figures/{name}", *options, f":alt: {alt or caption}"]
    return "\n".join([*lines, ":figclass: grass-figure", caption, "```"]) + "\n"
