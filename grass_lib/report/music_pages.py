"""Puts music into a page of the book where a run has only listed it and the music is at hand."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grass_lib.errors import GrassError
from grass_lib.report.music import LISTING, music_html, wanted

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from grass_lib.report.record import RunRecord

logger = logging.getLogger(__name__)
_MARK = f'class="grass-music {LISTING}'


def with_music(notebook: NotebookNode, record: RunRecord) -> NotebookNode:
    """Replaces a list of titles by piano rolls and sound, in place; the page stays as it is where that cannot be done.

    Only pages that are generated and never committed go through here: the music of MAESTRO may be shown with its
    credit, for no profit and under its own licence, and is no part of the repository.

    Args:
        notebook: A page from `to_page`.
        record: The run's record, whose note ``gallery`` names the windows.

    Returns:
        The same notebook.
    """
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ()) if _MARK in _html(output)]
    note = record.extra.get("gallery")
    if not outputs or not isinstance(note, dict) or not note.get("groups"):
        return notebook
    from grass_lib.experiments.data.maestro import find_windows
    from grass_lib.experiments.data.maestro_archive import archive_here

    if archive_here() is None:
        return notebook
    try:
        text = music_html(note, find_windows(wanted(note)))
    except GrassError as error:
        logger.warning("the music of %s is not shown: %s", record.run_id, error)
        return notebook
    for output in outputs:
        output["data"]["text/html"] = text
    return notebook


def _html(output: Any) -> str:
    text = (output.get("data") or {}).get("text/html", "")
    return text if isinstance(text, str) else "".join(text)
