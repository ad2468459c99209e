"""Notebooks on a cluster: what is pending becomes jobs, what they leave on the disk becomes outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from grass_lib.cluster.records import RUN, JobRecord, latest_jobs
from grass_lib.cluster.settings import Resources, Settings
from grass_lib.cluster.submit import Task, check_resources, submit
from grass_lib.cluster.watch import JobState, states, watch
from grass_lib.errors import GrassError, UsageError
from grass_lib.runner.execute import Outcome
from grass_lib.runner.parameters import read_parameters, resolve, split_assignments
from grass_lib.runner.planning import PlannedRun, experiments_by_name, why_pending
from grass_lib.runner.verify import load_status


@dataclass(frozen=True)
class Submitted:
    """A planned run and the job that makes it.

    Attributes:
        planned: The run.
        job: Its job; None where an identical run is finished.
        resources: What the job was given; None where it was there before, or is not needed.
    """

    planned: PlannedRun
    job: JobRecord | None
    resources: Resources | None = None


def run_words(planned: PlannedRun, force: bool) -> tuple[str, ...]:
    """The words behind ``grass`` that make a run on a node, or anywhere.

    Raises:
        GrassError: The parameters cannot be said in words.
    """
    texts = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in ((name, planned.parameters[name]) for name in planned.changed)
    ]
    template = read_parameters(planned.template)
    if resolve(template, split_assignments(texts), experiment=planned.experiment) != planned.parameters:
        raise GrassError(f"the parameters of {planned.run_id} do not survive a command line: {', '.join(texts)}")
    words = ["run", planned.experiment, "--scale", planned.scale, "-q"]
    return (*words, *(word for text in texts for word in ("-p", text)), *(["--force"] if force else []))


def grouped(
    planned: Sequence[PlannedRun], settings: Settings, force: bool, parallel: int | None = None
) -> dict[Resources, list[PlannedRun]]:
    """The runs that need jobs, by what the jobs ask for.

    Args:
        planned: All runs.
        settings: Of the cluster.
        force: Execute also what is finished.
        parallel: How many jobs of an array run at a time; None takes it from the settings.

    Raises:
        UsageError: An experiment that has not the scale.
    """
    groups: dict[Resources, list[PlannedRun]] = {}
    for item in planned:
        scales = experiments_by_name()[item.experiment].scales
        if item.scale not in scales:
            raise UsageError(f"{item.experiment} has no scale {item.scale!r}; it has {' and '.join(scales)}")
        if force or not finished(item):
            resources = settings.resources(item.experiment, item.scale)
            groups.setdefault(replace(resources, parallel=parallel or resources.parallel), []).append(item)
    return groups


def finished(planned: PlannedRun) -> bool:
    """Whether an identical run is finished; the nodes may see data that cannot be seen from here."""
    return not _pending(planned)


def _pending(planned: PlannedRun) -> str:
    if planned.data_fingerprint is None:
        with suppress(GrassError):
            planned = replace(planned, data_fingerprint=load_status(planned.folder).data_fingerprint)
    return why_pending(planned)


def submit_runs(
    planned: Sequence[PlannedRun], settings: Settings, *, force: bool = False, parallel: int | None = None
) -> list[Submitted]:
    """Submits what is neither finished nor already in the queue, one array for all that ask for the same.

    Args:
        planned: The runs.
        settings: Of the cluster.
        force: Execute also what is finished.
        parallel: How many jobs of an array run at a time; None takes it from the settings.

    Returns:
        One entry per run, in the order of ``planned``.

    Raises:
        UsageError: Slurm would not take a job; nothing was submitted.
        GrassError: Slurm does not answer.
    """
    groups = grouped(planned, settings, force, parallel)
    folders = {str(item.folder) for group in groups.values() for item in group}
    known = [job for job in latest_jobs() if job.kind == RUN and job.target in folders]
    entries = {state.job.target: Submitted(_of(planned, state), state.job) for state in states(known) if state.active}
    new = {
        resources: [item for item in group if str(item.folder) not in entries] for resources, group in groups.items()
    }
    words = {item.run_id: run_words(item, force) for group in new.values() for item in group}
    for resources, group in new.items():
        if group:
            check_resources(resources, ", ".join(item.run_id for item in group))
    for resources, group in new.items():
        tasks = [Task(RUN, item.run_id, item.folder, words[item.run_id]) for item in group]
        jobs = submit(tasks, resources, name="grass-run") if tasks else []
        for item, job in zip(group, jobs, strict=True):
            entries[job.target] = Submitted(item, job, resources)
    return [entries.get(str(item.folder), Submitted(item, None)) for item in planned]


def _of(planned: Sequence[PlannedRun], state: JobState) -> PlannedRun:
    return next(item for item in planned if str(item.folder) == state.job.target)


def collect_runs(
    submitted: Sequence[Submitted],
    *,
    report: Callable[[Outcome], Any] = lambda outcome: None,
    say: Callable[[str], Any] = lambda text: None,
) -> list[Outcome]:
    """Waits for the jobs; a run counts exactly as a local one does, by what is on the disk.

    Args:
        submitted: What `submit_runs` gave.
        report: Called with each outcome as it comes.
        say: Called with a line about all jobs when something changed.

    Returns:
        One outcome per run, in the same order.

    Raises:
        GrassError: Slurm does not answer any more; the jobs go on.
    """
    outcomes: dict[str, Outcome] = {}

    def take(outcome: Outcome) -> None:
        outcomes[outcome.planned.run_id] = outcome
        report(outcome)

    for item in submitted:
        if item.job is None:
            take(Outcome(item.planned, "skipped", "an identical run is finished"))
    runs = {item.job.id: item.planned for item in submitted if item.job is not None}
    jobs = [item.job for item in submitted if item.job is not None]
    watch(jobs, report=lambda state: take(_outcome(runs[state.job.id], state)), say=say)
    return [outcomes[item.planned.run_id] for item in submitted]


def _outcome(planned: PlannedRun, state: JobState) -> Outcome:
    problem = state.message if not state.good else _pending(planned)
    if problem:
        return Outcome(planned, "failed", f"{problem}; log of job {state.job.id}: {state.job.log}")
    status = load_status(planned.folder)
    seconds = datetime.fromisoformat(status.ended) - datetime.fromisoformat(status.started)
    return Outcome(planned, "done", "", seconds.total_seconds())
