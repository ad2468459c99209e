"""The command ``grass jobs``: what was submitted to Slurm, how it stands, its logs."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from grass_lib.cli_output import near, show_job, show_jobs
from grass_lib.cluster.queue import cancel as cancel_jobs
from grass_lib.cluster.queue import require_slurm
from grass_lib.cluster.records import RUN, JobRecord, all_jobs, latest_jobs
from grass_lib.cluster.watch import JobState, states, watch
from grass_lib.errors import GrassError, UsageError

app = typer.Typer(help="Jobs on a Slurm cluster: list, logs, wait, cancel.", no_args_is_help=True)

Names = Annotated[list[str] | None, typer.Argument(metavar="JOB", help="Job ids, array ids or run ids.")]
_FOLLOW_SECONDS = 5.0


@app.command(name="list")
def list_jobs(
    every: Annotated[bool, typer.Option("--all", help="Also jobs that later ones took the place of.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the jobs that were submitted from this project: id, state, what it makes, log."""
    require_slurm()
    found = states(all_jobs() if every else latest_jobs())
    if as_json:
        typer.echo(json.dumps([_to_json(state) for state in found], indent=1))
        return
    show_jobs(found)
    if not found:
        typer.echo("no jobs; submit some with `grass run --executor slurm`")


@app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="JOB", help="A job id or a run id.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Print what comes, until the job has ended.")] = False,
) -> None:
    """Print the log of a job, and of a notebook what its cells wrote."""
    (job, *others) = chosen([name], latest_jobs() if not name.replace("_", "").isdigit() else all_jobs())
    if others:
        raise UsageError(f"{name!r} is {len(others) + 1} jobs, expected one; such as {job.id}")
    paths = [Path(job.log)] + ([Path(job.target) / "log.txt"] if job.kind == RUN else [])
    if follow:
        require_slurm()
        _follow(job, paths)
        return
    there = [path for path in paths if path.is_file()]
    if not there:
        raise GrassError(f"job {job.id} has written no log yet; `grass jobs list` says how it stands")
    for path in there:
        typer.echo(f"==> {near(path)} <==")
        typer.echo(path.read_text(encoding="utf-8", errors="replace"))


def _follow(job: JobRecord, paths: Sequence[Path]) -> None:
    # By name: a run's log begins anew with each attempt.
    words = ["tail", "--lines=+1", "--follow=name", "--retry", "--quiet", *map(str, paths)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        while states([job])[0].active:
            time.sleep(_FOLLOW_SECONDS)
        time.sleep(1.0)  # its last lines
    except KeyboardInterrupt as error:
        raise typer.Exit(0) from error
    finally:
        process.terminate()
        process.wait()


@app.command()
def wait(names: Names = None) -> None:
    """Wait until jobs have ended, all of them without any named; exit 1 if one failed."""
    require_slurm()
    jobs = chosen(names, latest_jobs()) if names else [state.job for state in states(latest_jobs()) if state.active]
    finish(jobs)


def finish(jobs: Sequence[JobRecord]) -> None:
    """Waits for jobs and says how each ended.

    Args:
        jobs: Which ones.

    Raises:
        GrassError: One of them failed.
    """
    ended = watch(jobs, report=show_job, say=lambda text: typer.echo(f"jobs: {text}", err=True))
    bad = [state for state in ended if not state.good]
    if bad:
        raise GrassError(
            f"{len(bad)} of {len(ended)} jobs did not end well: {', '.join(state.job.name for state in bad)}; their "
            "logs are named above"
        )


@app.command()
def cancel(
    names: Names = None,
    every: Annotated[bool, typer.Option("--all", help="All jobs of this project that wait or run.")] = False,
) -> None:
    """Cancel jobs; what they have finished stays, and the same `grass run` submits the rest again."""
    require_slurm()
    if bool(names) == every:
        raise UsageError("expected job ids, array ids or run ids, or --all; `grass jobs list` shows them")
    jobs = chosen(names, latest_jobs()) if names else latest_jobs()
    active = [state.job for state in states(jobs) if state.active]
    if not active:
        typer.echo("nothing to cancel: none of these jobs waits or runs")
        return
    cancel_jobs([job.id for job in active])
    for job in active:
        typer.echo(f"cancelled {job.id} {job.name}")


def chosen(names: Sequence[str], jobs: Sequence[JobRecord]) -> list[JobRecord]:
    """The jobs that a user names by their id, the id of their array, or what they make.

    Raises:
        UsageError: A name that fits none.
    """
    found: dict[str, JobRecord] = {}
    for name in names:
        fitting = [job for job in jobs if name in (job.id, job.id.partition("_")[0], job.name, Path(job.target).name)]
        if not fitting:
            known = ", ".join(f"{job.id} {job.name}" for job in jobs[-10:]) or "none"
            raise UsageError(f"no job is called {name!r}; the last ones are {known}")
        found |= {job.id: job for job in fitting}
    return list(found.values())


def _to_json(state: JobState) -> dict[str, object]:
    job = state.job
    entry = vars(state.entry) if state.entry is not None else None
    return {
        "job": job.id, "state": state.state, "kind": job.kind, "name": job.name, "target": job.target,
        "message": state.message, "log": job.log, "submitted": job.submitted, "command": ["grass", *job.words],
        "slurm": entry,
    }  # fmt: skip
