"""Makes an executed notebook fit to be shown: nothing of one machine or one clock, no overdrawn progress lines."""

from __future__ import annotations

from typing import Any

from grass_lib.report.scrub import scrub_text

_VOLATILE = ("papermill", "execution", "widgets")


def _last_state(text: str) -> str:
    """What a terminal would show in the end: a carriage return goes back to the start of the line."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for state in line.split("\r"):
            shown = state + shown[len(state) :]
        lines.append(shown.rstrip(" "))
    return "\n".join(lines)


def _merged(outputs: list[Any]) -> list[Any]:
    """Outputs with the pieces of one stream put together, and without streams that show nothing in the end."""
    merged: list[Any] = []
    for output in outputs:
        stream = output["output_type"] == "stream"
        if stream and merged and merged[-1]["output_type"] == "stream" and merged[-1]["name"] == output["name"]:
            merged[-1]["text"] += output["text"]
        else:
            merged.append(output)
    for output in merged:
        if output["output_type"] == "stream":
            output["text"] = scrub_text(_last_state(output["text"]))
    return [output for output in merged if output["output_type"] != "stream" or output["text"].strip()]


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
        if cell.get("outputs"):
            cell["outputs"] = _merged(cell["outputs"])
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                continue
            if output["output_type"] == "error":
                output["traceback"] = _scrub(output["traceback"])
                output["evalue"] = scrub_text(output["evalue"])
            else:
                for kind, content in output["data"].items():
                    if not kind.startswith(("image/png", "image/jpeg", "application/pdf")):
                        output["data"][kind] = _scrub(content)
    return notebook
