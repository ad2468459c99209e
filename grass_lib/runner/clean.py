"""Makes an executed notebook fit to be shown: nothing of one machine or one clock, no overdrawn progress lines."""

from __future__ import annotations

from typing import Any

from grass_lib.report.scrub import scrub_text

_VOLATILE = ("papermill", "execution", "widgets")


def _last_state(text: str) -> str:
    """What a terminal would show: a carriage return starts the line again."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        states = [state for state in line.split("\r") if state.strip()]
        lines.append(states[-1] if states else "")
    return "\n".join(lines)


def _scrub(value: Any) -> Any:
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, list):
        return [_scrub(item) for item in value]
    if isinstance(value, dict):
        return {key: _scrub(item) for key, item in value.items()}
    return value


def clean_notebook(notebook: Any) -> Any:
    """Takes volatile metadata, absolute paths and overdrawn progress lines out of a notebook.

    Args:
        notebook: an executed notebook (nbformat); changed in place.

    Returns:
        The same notebook.
    """
    for holder in (notebook, *notebook.cells):
        for name in _VOLATILE:
            holder.metadata.pop(name, None)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                output["text"] = scrub_text(_last_state(output["text"]))
            elif output["output_type"] == "error":
                output["traceback"] = _scrub(output["traceback"])
                output["evalue"] = scrub_text(output["evalue"])
            else:
                for kind, content in output["data"].items():
                    if not kind.startswith(("image/png", "image/jpeg", "application/pdf")):
                        output["data"][kind] = _scrub(content)
    return notebook
