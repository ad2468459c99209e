"""What Slurm says about jobs, through its own commands."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grass_lib.errors import GrassError, UsageError

logger = logging.getLogger(__name__)

_SECONDS = 60
_FIELDS = "%i|%T|%M|%N|%r"
# States from which a job does not come back; after the others (pre-empted, lost node) Slurm may queue it again.
FINAL = frozenset({"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE"})
GONE = FINAL | {"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED"}


@dataclass(frozen=True)
class QueueEntry:
    """A job as Slurm sees it.

    Attributes:
        state: Such as ``PENDING``, ``RUNNING`` or ``CANCELLED``.
        elapsed: Time used, as Slurm writes it.
        node: Where it runs.
        reason: Why it waits.
    """

    state: str
    elapsed: str = ""
    node: str = ""
    reason: str = ""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in GONE


def require_slurm() -> None:
    """Checks that jobs can be submitted from here.

    Raises:
        UsageError: Slurm's commands or submitit are missing.
    """
    import importlib.util

    if importlib.util.find_spec("submitit") is None:
        raise UsageError(
            "jobs on a cluster need the package submitit; pip install submitit, or work here with --executor local"
        )
    missing = [name for name in ("sbatch", "squeue", "scancel", "srun") if shutil.which(name) is None]
    if missing:
        raise UsageError(
            f"jobs on a cluster need Slurm's commands, and {', '.join(missing)} cannot be found here; run this on a "
            "login node of the cluster, or work here with --executor local"
        )


def call(words: Sequence[str], *, seconds: float = _SECONDS) -> str:
    """Output of a command of Slurm.

    Args:
        words: The command.
        seconds: How long it may take.

    Raises:
        GrassError: It failed or took longer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GrassError(f"{words[0]} does not work here: {error}; see whether Slurm answers: sinfo") from error
    if done.returncode:
        text = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise GrassError(f"{words[0]} failed: {text}; see whether Slurm answers: sinfo")
    return done.stdout


def look(job_ids: Iterable[str]) -> dict[str, QueueEntry]:
    """What is known of jobs: from the queue, which forgets ended ones after minutes, then from the accounting if any.

    Args:
        job_ids: Such as ``12`` or, of an array, ``12_0``.

    Returns:
        By id; those that Slurm has forgotten are left out.

    Raises:
        GrassError: Slurm does not answer.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    listing = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--format={_FIELDS}"]
    found = {}
    for line in call(listing).splitlines():
        job_id, *rest = (part.strip() for part in line.split("|"))
        if job_id in wanted and len(rest) == 4:
            found[job_id] = QueueEntry(*rest)
    return found | _accounted(wanted - found.keys())


def _accounted(job_ids: set[str]) -> dict[str, QueueEntry]:
    if not job_ids or shutil.which("sacct") is None:
        return {}
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,Elapsed,NodeList"]
    try:
        text = call([*words, f"--jobs={','.join(sorted(job_ids))}"])
    except GrassError as error:  # a cluster need not keep accounts
        logger.debug("%s", error)
        return {}
    found = {}
    for line in text.splitlines():
        job_id, state, elapsed, node = (*line.split("|"), "", "", "")[:4]
        if job_id in job_ids and state:
            found[job_id] = QueueEntry(state.split()[0], elapsed, node)  # "CANCELLED by 1000"
    return found


def cancel(job_ids: Sequence[str]) -> None:
    """Cancels jobs.

    Raises:
        GrassError: Slurm refused.
    """
    call(["scancel", *job_ids])
