"""Whether runs could be kept here, asked before the first one begins."""

from __future__ import annotations

import tempfile
from pathlib import Path

from grass_lib.errors import GrassError, UsageError
from grass_lib.project import runs_root
from grass_lib.report.files import disk_full_message, is_disk_full


def preflight(jobs: int, *, dry: bool = False) -> None:
    """Checks that the folder of the runs can be written to.

    Args:
        jobs: number of runs at a time.
        dry: whether nothing is to stay, not even the folder.

    Raises:
        UsageError: ``jobs`` is not positive, or the folder cannot be made or written to.
        GrassError: the disk is full.
    """
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}, expected a whole number >= 1")
    folder = runs_root()
    try:
        if not dry:
            folder.mkdir(parents=True, exist_ok=True)
        place = next(item for item in (folder, *folder.parents) if item.exists())
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=place) as probe:
            (Path(probe) / "probe").write_bytes(b"x" * 4096)
    except OSError as error:
        if is_disk_full(error):
            raise GrassError(disk_full_message(folder)) from error
        raise UsageError(
            f"the folder of the runs, {folder}, cannot be written to ({error.strerror}); set GRASS_RUNS to one that can"
        ) from error
