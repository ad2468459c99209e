"""Runs on a SLURM cluster, one job per notebook, through the package ``submitit``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grass_lib.errors import UsageError
from grass_lib.runner.execute import Outcome, execute_run
from grass_lib.runner.planning import PlannedRun

JOB_FOLDER = "slurm"


class RunTask:
    """One planned run as a job; when the job is pre-empted it is queued again and goes on from the run's ``store/``."""

    def __call__(self, planned: PlannedRun, force: bool) -> Outcome:
        """Executes the run on the node."""
        return execute_run(planned, force=force, progress=False)

    def checkpoint(self, planned: PlannedRun, force: bool) -> Any:
        """What to queue in place of a pre-empted job."""
        import submitit  # pyright: ignore[reportMissingImports]

        return submitit.helpers.DelayedSubmission(self, planned, force)


def require_submitit() -> None:
    """Checks that jobs can be submitted.

    Raises:
        UsageError: ``submitit`` is not installed.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UsageError("--executor slurm needs the package submitit; pip install submitit, or use --executor local")


def run_on_slurm(
    planned: Sequence[PlannedRun],
    folder: Path,
    *,
    jobs: int = 1,
    force: bool = False,
    options: dict[str, Any] | None = None,
    report: Callable[[Outcome], Any] = lambda outcome: None,
) -> list[Outcome]:
    """Submits one job array and waits for it.

    Args:
        planned: the runs.
        folder: a folder that the nodes share; logs of the jobs go to ``slurm/`` below it.
        jobs: how many jobs at a time.
        force: execute also what is finished.
        options: further options of ``submitit``, such as ``slurm_partition``.
        report: called with each outcome as it comes.

    Returns:
        One outcome per run, in the order of ``planned``.

    Raises:
        UsageError: ``submitit`` is not installed.
    """
    require_submitit()
    import submitit  # pyright: ignore[reportMissingImports]

    executor = submitit.AutoExecutor(folder=folder / JOB_FOLDER)
    executor.update_parameters(name="grass", slurm_array_parallelism=jobs, **{"timeout_min": 240, **(options or {})})
    with executor.batch():
        submitted = [executor.submit(RunTask(), item, force) for item in planned]
    outcomes = []
    for item, job in zip(planned, submitted, strict=True):
        error = job.exception()
        outcome = Outcome(item, "failed", f"job {job.job_id} failed: {error}") if error is not None else job.result()
        report(outcome)
        outcomes.append(outcome)
    return outcomes
