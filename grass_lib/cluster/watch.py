"""How jobs stand: Slurm says whether they wait or run, exit stamps and what is on the disk say how they ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from grass_lib.cluster.queue import FINAL, QueueEntry, look
from grass_lib.cluster.records import RUN, JobRecord
from grass_lib.errors import GrassError, RecordError
from grass_lib.runner.verify import load_status, verify_run

DONE, FAILED, ENDED = "done", "failed", "ended"
# Files of a node may be seen late here, and a job that lost its node may be queued again.
PATIENCE_SECONDS = 30.0
_POLL_SECONDS = (2.0, 15.0)
_SILENCES = 20


@dataclass(frozen=True)
class JobState:
    """How one job stands.

    Attributes:
        job: Which one.
        state: A state of Slurm in lower case while it waits or runs; then ``done``, ``failed``, ``cancelled``,
            ``timeout`` and so on, or ``ended`` where nobody knows how.
        settled: Whether this is the end for sure.
        message: What failed.
        entry: What Slurm says, if anything.
    """

    job: JobRecord
    state: str
    settled: bool
    message: str = ""
    entry: QueueEntry | None = None

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return self.entry is not None and self.entry.active

    @property
    def good(self) -> bool:
        """Whether it ended as it should."""
        return self.state == DONE


def states(jobs: Sequence[JobRecord]) -> list[JobState]:
    """How jobs stand right now.

    Raises:
        GrassError: Slurm does not answer.
    """
    queue = look(job.id for job in jobs)
    return [judge(job, queue.get(job.id)) for job in jobs]


def judge(job: JobRecord, entry: QueueEntry | None) -> JobState:
    """How one job stands.

    Args:
        job: Which one.
        entry: What Slurm says; None where it has forgotten the job.
    """
    if entry is not None and entry.active:
        return JobState(job, entry.state.lower(), False, entry=entry)
    code = job.exit_code
    if code == 0:
        problem = _run_problem(job) if job.kind == RUN else ""
        return JobState(job, FAILED if problem else DONE, True, problem, entry)
    if code is not None:
        message = (_run_problem(job) if job.kind == RUN else "") or f"exit code {code}: {last_words(Path(job.log))}"
        return JobState(job, FAILED, True, message, entry)
    state = entry.state if entry is not None else ""
    if state in FINAL - {"COMPLETED"}:
        words = last_words(Path(job.log))
        return JobState(job, state.lower(), True, f"Slurm says {state}" + (f": {words}" if words else ""), entry)
    message = f"it left the queue without an exit code{f' ({state})' if state else ''}"
    return JobState(job, state.lower() if state and state != "COMPLETED" else ENDED, False, message, entry)


def _run_problem(job: JobRecord) -> str:
    """What is wrong with the run that a job made; empty where nothing is, or where the job did not get that far."""
    folder = Path(job.target)
    try:
        ended = datetime.fromisoformat(load_status(folder).ended)
    except (RecordError, ValueError):
        return ""
    if job.exit_code != 0 and ended < datetime.fromisoformat(job.submitted):
        return ""
    problems = verify_run(folder)
    return problems[0] if problems else ""


def last_words(log: Path) -> str:
    """The last error in a log, else its last line; empty where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1]


def watch(
    jobs: Sequence[JobRecord],
    *,
    report: Callable[[JobState], Any] = lambda state: None,
    say: Callable[[str], Any] = lambda text: None,
) -> list[JobState]:
    """Waits until all jobs have ended.

    Args:
        jobs: Which ones.
        report: Called once with each as it ends.
        say: Called with a line about all when something changed.

    Returns:
        How each ended, in the order of ``jobs``.

    Raises:
        GrassError: Slurm did not answer many times in a row. The jobs go on.
    """
    ended: dict[str, JobState] = {}
    missed: dict[str, float] = {}
    pause, silences, shown = _POLL_SECONDS[0], 0, ""
    while waiting := [job for job in jobs if job.id not in ended]:
        try:
            found, silences = states(waiting), 0
        except GrassError as error:
            silences += 1
            if silences == _SILENCES:
                raise GrassError(f"{error}; the jobs go on: give the same command again to wait for them") from error
            found = []
        for state in found:
            if state.active:
                missed.pop(state.job.id, None)
            elif (
                state.settled or time.monotonic() - missed.setdefault(state.job.id, time.monotonic()) > PATIENCE_SECONDS
            ):
                ended[state.job.id] = state
                report(state)
        line = _summary(found)
        if line and line != shown:
            say(line)
            shown = line
        if len(ended) < len(jobs):
            time.sleep(pause)
            pause = min(pause * 1.1, _POLL_SECONDS[1])
    return [ended[job.id] for job in jobs]


def _with_reason(state: JobState) -> str:
    """A state, and why it waits: some reasons, such as a limit that is passed, never go away."""
    reason = state.entry.reason if state.entry is not None and state.state == "pending" else ""
    return f"{state.state} ({reason})" if reason not in ("", "None", "Priority", "Resources") else state.state


def _summary(found: Sequence[JobState]) -> str:
    counts: Mapping[str, int] = Counter(_with_reason(state) for state in found)
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
