"""Where the project's folders are: the templates and the runs."""

from __future__ import annotations

import os
from pathlib import Path

from grass_lib.errors import UsageError


def package_folder() -> Path:
    """The folder of the package ``grass_lib`` itself."""
    return Path(__file__).resolve().parent


def project_root() -> Path:
    """The project's root, the folder that holds ``notebooks/``.

    Returns:
        The folder named by the environment variable ``GRASS_ROOT``; else the nearest folder from the current one
        upwards that holds ``_config.yml`` and ``notebooks/``; else the folder that holds the package.

    Raises:
        UsageError: ``GRASS_ROOT`` names no folder with ``notebooks/`` in it.
    """
    named = os.environ.get("GRASS_ROOT")
    if named:
        root = Path(named).expanduser().resolve()
        if not (root / "notebooks").is_dir():
            raise UsageError(
                f"GRASS_ROOT is {named!r}, which has no folder notebooks/; set it to the project's root, or unset it"
            )
        return root
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "_config.yml").is_file() and (folder / "notebooks").is_dir():
            return folder
    return package_folder().parent


def runs_root(root: Path | None = None) -> Path:
    """The folder below which every run has its own folder.

    Args:
        root: the project's root; None looks for it.

    Returns:
        The folder named by the environment variable ``GRASS_RUNS``, else ``runs/`` in the project's root, else
        ``runs/`` in the current folder when the package is installed and no project is near.

    Raises:
        UsageError: ``GRASS_RUNS`` is a file, or ``GRASS_ROOT`` is wrong.
    """
    named = os.environ.get("GRASS_RUNS")
    if named:
        folder = Path(named).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"GRASS_RUNS is {named!r}, which is not a folder; name a folder, or unset it")
        return folder
    root = root or project_root()
    return (root if (root / "notebooks").is_dir() else Path.cwd().resolve()) / "runs"


def missing_runs() -> str:
    """What to say to somebody who looks for runs in a folder that is not there; empty where ``GRASS_RUNS`` is none.

    Raises:
        UsageError: ``GRASS_RUNS`` is a file.
    """
    named = os.environ.get("GRASS_RUNS")
    if not named or runs_root().is_dir():
        return ""
    return f"GRASS_RUNS is {named!r}, which does not exist, so no run of yours is found; correct it, or unset it"
