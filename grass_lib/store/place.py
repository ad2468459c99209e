"""The folder of a store, checked before anything is computed for it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from grass_lib.errors import UsageError


def store_folder(path: str | os.PathLike[str], argument: str = "store") -> Path:
    """A folder that holds a store, or may be made for one.

    Args:
        path: As it was given.
        argument: Under which name, for the message.

    Raises:
        UsageError: It is empty, no path, or it or one of its parents is a file.
    """
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"{argument} is a {type(path).__name__}; expected the path of a folder, such as 'store'")
    text = os.fspath(path)
    if not text.strip():
        raise UsageError(f"{argument} is {text!r}; expected the path of a folder, such as 'store' ('.' for this one)")
    folder = Path(path)
    file = _file_on(folder)
    if file is not None:
        seen = "which is a file" if file == folder else f"and {str(file)!r} is a file"
        raise UsageError(f"{argument} is {text!r}, {seen}; expected the path of a folder, or of one to be made")
    return folder


def _file_on(folder: Path) -> Path | None:
    # What may not be looked at is left to whoever makes the folder, where the system says why.
    with suppress(OSError):
        return next((part for part in (folder, *folder.parents) if part.is_file()), None)
    return None
