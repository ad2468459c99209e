"""What was submitted: one small JSON file per submission in ``runs/slurm/``, beside submitit's files and the logs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grass_lib.cluster.job import stamp_path
from grass_lib.project import runs_root

logger = logging.getLogger(__name__)

FOLDER = "slurm"
VERSION = 1
RUN, CACHE, CHECK = "run", "cache", "check"
_SUFFIX = ".submitted.json"


@dataclass(frozen=True)
class JobRecord:
    """One job of a submission.

    Attributes:
        id: Such as ``12`` or, of an array, ``12_0``.
        kind: ``run`` (a notebook), ``cache`` (a part of a store) or ``check`` (that the store is whole).
        name: What it makes, for people: a run id, or a store and a part of it.
        target: Folder of the run or the store.
        words: The command behind ``grass``.
        log: Path of the job's log.
        submitted: ISO 8601 with time zone.
    """

    id: str
    kind: str
    name: str
    target: str
    words: tuple[str, ...]
    log: str
    submitted: str

    @property
    def exit_code(self) -> int | None:
        """That of its command; None before the end, and for jobs that were ended from outside."""
        try:
            return int(stamp_path(Path(self.log).parent, self.id).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def jobs_folder() -> Path:
    """Folder of the submissions; the nodes see it too."""
    return runs_root() / FOLDER


def write_submission(jobs: Sequence[JobRecord], resources: dict[str, Any]) -> None:
    """Keeps a submission.

    Args:
        jobs: Its jobs.
        resources: What each asked for.
    """
    from grass_lib.report.files import json_bytes, write_atomic

    value = {"schema_version": VERSION, "resources": resources, "jobs": [asdict(job) for job in jobs]}
    write_atomic(jobs_folder() / f"{jobs[0].id.partition('_')[0]}{_SUFFIX}", json_bytes(value))


def all_jobs() -> list[JobRecord]:
    """Every job that was submitted from this project, the oldest first; damaged files are left out with a warning."""
    found = []
    for path in jobs_folder().glob(f"*{_SUFFIX}"):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["schema_version"] != VERSION:
                raise ValueError(f"schema version {value['schema_version']}")
            found += [JobRecord(**{**job, "words": tuple(job["words"])}) for job in value["jobs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s) and is left out; `squeue --me` shows the jobs", path.name, error)
    return sorted(found, key=lambda job: (job.submitted, _order(job.id)))


def latest_jobs() -> list[JobRecord]:
    """The last job of each run and each part of a store."""
    return list({(job.name, job.target): job for job in all_jobs()}.values())


def _order(job_id: str) -> tuple[int, ...]:
    return tuple(int(part) for part in job_id.split("_") if part.isdigit())
