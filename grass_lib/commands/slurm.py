"""The options of commands that can hand their work to Slurm, and what they do with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from grass_lib.cli_output import console_for, near, show_outcome
from grass_lib.cluster.settings import Settings
from grass_lib.errors import UsageError
from grass_lib.runner.execute import INTERRUPTED, check_outcomes
from grass_lib.runner.planning import PlannedRun
from grass_lib.runner.preflight import preflight

_PANEL = "Slurm"
SlurmOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="NAME=VALUE",
        help="With --executor slurm: partition, account, qos, constraint, time, gpus, cpus, memory, parallel, "
        "requeues, setup (a line of shell; again for more) or sbatch.OPTION; slurm.toml in the project's root holds "
        "the same.",
        rich_help_panel=_PANEL,
    ),
]
NoWait = Annotated[
    bool,
    typer.Option(
        "--no-wait",
        help="Return once the jobs are submitted; `grass jobs wait` waits for them.",
        rich_help_panel=_PANEL,
    ),
]


def slurm_settings(executor: str, typed: Sequence[str], no_wait: bool) -> Settings | None:
    """What jobs ask for, or None where nothing is submitted.

    Args:
        executor: ``local`` or ``slurm``.
        typed: What stood behind each ``--slurm``.
        no_wait: Whether ``--no-wait`` was given.

    Raises:
        UsageError: A wrong setting, a setting without ``--executor slurm``, or no Slurm here.
    """
    if executor == "local":
        if typed or no_wait:
            given = f"--slurm {typed[0]}" if typed else "--no-wait"
            raise UsageError(f"{given} means something with --executor slurm only; give that too, or leave it out")
        return None
    from grass_lib.cluster.queue import require_slurm
    from grass_lib.cluster.settings import load_settings
    from grass_lib.project import project_root
    from grass_lib.runner.planning import experiments_by_name

    settings = load_settings(project_root(), typed, experiments_by_name())
    require_slurm()
    return settings


def say(text: str) -> None:
    """Prints a line on standard error."""
    console_for(stderr=True).print(escape(text))


def go_on_later() -> typer.Exit:
    """What Ctrl-C means while jobs are waited for."""
    say("no longer waiting; the jobs go on: `grass jobs list` shows them, `grass jobs cancel --all` ends them")
    return typer.Exit(INTERRUPTED)


def run_on_slurm(
    planned: Sequence[PlannedRun],
    settings: Settings,
    *,
    parallel: int | None,
    force: bool,
    wait: bool,
    dry_run: bool,
) -> None:
    """Submits runs, and waits for them where that is wanted.

    Args:
        planned: The runs.
        settings: Of the cluster.
        parallel: How many at a time; None leaves it to the settings.
        force: Execute also what is finished.
        wait: Whether to wait.
        dry_run: Only say what would be submitted.

    Raises:
        UsageError: Slurm would not take a job; nothing was submitted.
        GrassError: A run failed, or Slurm does not answer.
    """
    from grass_lib.cluster.runs import collect_runs, grouped, submit_runs

    for item in planned:
        for problem in item.problems[:1]:
            say(f"{item.run_id}: on this machine {problem}; its job looks again on its node")
    preflight(1, dry=dry_run)
    if dry_run:
        groups = grouped(planned, settings, force, parallel)
        pending = {item.run_id for group in groups.values() for item in group}
        for item in planned:
            if item.run_id not in pending:
                typer.echo(f"{item.run_id}: skip, an identical run is finished")
        for resources, group in groups.items():
            typer.echo(f"array of {len(group)}: {resources.shown()}")
            for item in group:
                typer.echo(f"  {item.run_id} ({item.pending or 'forced'})")
        return
    submitted = submit_runs(planned, settings, force=force, parallel=parallel)
    for item in submitted:
        if item.job is not None:
            how = "submitted" if item.resources is not None else "in queue"
            say(f"{how:<9} {item.planned.run_id} as job {item.job.id}; to follow: grass jobs logs -f {item.job.id}")
    if not wait:
        return
    try:
        outcomes = collect_runs(submitted, report=show_outcome, say=lambda text: say(f"jobs: {text}"))
    except KeyboardInterrupt as error:
        raise go_on_later() from error
    check_outcomes(outcomes)


def cache_on_slurm(
    words: Sequence[str],
    store: Path,
    workers: int,
    settings: Settings,
    *,
    experiment: str,
    scale: str,
    wait: bool,
) -> None:
    """Submits the workers of a store, and waits for them where that is wanted.

    Args:
        words: The command behind ``grass``, without ``--worker``.
        store: Folder of the store.
        workers: How many.
        settings: Of the cluster.
        experiment: What is cached.
        scale: ``embedded`` or ``paper``.
        wait: Whether to wait.

    Raises:
        UsageError: Slurm would not take a job; nothing was submitted.
        GrassError: A worker failed, or the store is not whole.
    """
    from grass_lib.cluster.caching import submit_cache
    from grass_lib.commands.jobs import finish

    preflight(1)
    jobs = submit_cache(words, store, workers, settings.resources(experiment, scale))
    for job in jobs:
        say(f"submitted {job.name} as job {job.id}; log: {near(Path(job.log))}")
    if not wait:
        return
    try:
        finish(jobs)
    except KeyboardInterrupt as error:
        raise go_on_later() from error
    typer.echo(f"{store}: whole, written by {workers} workers")
