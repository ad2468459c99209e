"""Takes the paths of one machine out of what is published: records and executed notebooks."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.errors import UsageError
from grass_lib.project import package_folder, project_root, runs_root

_CELL = re.compile(r"/[\w./-]*/ipykernel_\d+/\d+\.py")
# An absolute path of at least two parts; not a part of a URL, of a relative path or of what was replaced before.
_ABSOLUTE = re.compile(r"(?<![\w.~$>/:])/(?:[\w.@+-]+/)+([\w.@+-]+)")


def _places() -> list[tuple[str, str]]:
    """Folders of this machine and what stands for them, the longest first."""
    named: list[tuple[str | Path | None, str]] = [
        (sys.base_prefix, "<python>"),
        (tempfile.gettempdir(), "<tmp>"),
        (Path.home(), "~"),
        (sys.prefix, "<env>"),
        (package_folder().parent, "."),
        (os.environ.get("GRASS_DATA"), "$GRASS_DATA"),
    ]
    try:
        root = project_root()
        named += [(root, "."), (runs_root(root), "runs")]
    except UsageError:
        pass  # a wrong GRASS_ROOT is reported where it matters; here only that folder cannot be named
    places = {}
    for folder, name in named:
        for text in (str(folder), str(Path(folder).resolve())) if folder else ():
            if text.count("/") >= 1 and text != "/":
                places[text.rstrip("/")] = name
    return sorted(places.items(), key=lambda item: -len(item[0]))


def scrub_text(text: str) -> str:
    """Replaces the folders of this machine by short names such as ``runs``, ``<env>`` and ``~``.

    Args:
        text: any text.

    Returns:
        The text without them.
    """
    if "/" not in text:
        return text
    text = _CELL.sub("<cell>", text)
    for folder, name in _places():
        if folder in text:
            text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w.-])", lambda _, name=name: name, text)
    return text


def has_absolute_path(text: str) -> bool:
    """Whether a text names an absolute path of at least two parts."""
    return bool(_ABSOLUTE.search(text))


def scrub_json(value: Any) -> Any:
    """The same for every string inside a JSON value; absolute paths that are left keep only their last part.

    Args:
        value: strings, numbers, lists and dictionaries.

    Returns:
        A copy.
    """
    if isinstance(value, str):
        return _ABSOLUTE.sub(r"<path>/\1", scrub_text(value))
    if isinstance(value, Mapping):
        return {str(key): scrub_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_json(item) for item in value]
    return value
