"""Finds runs: those below ``runs/`` and those committed below ``book/measured/``."""

from __future__ import annotations

import logging
from pathlib import Path

from grass_lib.errors import RecordError, UsageError
from grass_lib.project import project_root, runs_root
from grass_lib.report.schema import RunRecord, load_record
from grass_lib.runner.verify import NOTEBOOK, PART, RECORD, STATUS, load_status, verify_run

logger = logging.getLogger(__name__)


def is_manual(folder: Path) -> bool:
    """Whether a run was made by hand in Jupyter, not by `grass run`: such a run never counts."""
    return not any((folder / name).exists() for name in (STATUS, NOTEBOOK, PART, "run.lock"))


def has_other_parameters(folder: Path) -> bool:
    """Whether a run's parameters, the device aside, are not the notebook's own; False where its stamp is damaged."""
    try:
        return bool(set(load_status(folder).changed) - {"device"})
    except RecordError:
        return False


def run_folders(root: Path | None = None) -> list[Path]:
    """Folders of all runs, committed ones last.

    Args:
        root: the project's root; None looks for it.
    """
    root = root or project_root()
    folders = []
    for place in (runs_root(root), root / "book" / "measured"):
        if place.is_dir():
            names = (STATUS, NOTEBOOK, PART, RECORD, "run.lock", "store")
            folders += sorted(item for item in place.iterdir() if any((item / name).exists() for name in names))
    return folders


def find_run(name: str, root: Path | None = None) -> Path:
    """The folder of a run that a user names.

    Args:
        name: a run id, the name of a committed run, or a path of its folder.
        root: the project's root; None looks for it.

    Raises:
        UsageError: there is none.
    """
    root = root or project_root()
    candidates = [runs_root(root) / name, root / "book" / "measured" / name, Path(name)]
    for folder in candidates:
        if folder.is_dir():
            return folder
    known = [folder.name for folder in run_folders(root)]
    raise UsageError(
        f"there is no run {name!r}; there are {', '.join(known) if known else 'none, make one with `grass run`'}"
    )


def verified_records(root: Path | None = None, *, scale: str | None = None) -> list[RunRecord]:
    """Records of the runs that count, the best first: parameters as in the template, then the newest.

    Args:
        root: the project's root; None looks for it.
        scale: only this scale.

    Returns:
        Records. A run that does not verify is left out with a warning.
    """
    found = []
    for folder in run_folders(root):
        if is_manual(folder) or not (folder / RECORD).is_file():
            continue
        try:
            record = load_record(folder / RECORD)
        except RecordError as error:
            logger.warning("%s is left out: %s", folder.name, error)
            continue
        if scale is not None and record.scale != scale:
            continue
        problems = verify_run(folder)
        if problems:
            logger.warning("%s is left out: %s", folder.name, problems[0])
            continue
        found.append((has_other_parameters(folder), record))
    newest = sorted(found, key=lambda item: item[1].finished, reverse=True)
    return [record for _, record in sorted(newest, key=lambda item: item[0])]
