"""A gradient store on a cluster: one job per worker, then one that reads every shard and says whether it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from grass_lib.cluster.records import CACHE, CHECK, JobRecord, latest_jobs
from grass_lib.cluster.settings import Resources
from grass_lib.cluster.submit import Task, check_resources, submit
from grass_lib.cluster.watch import states
from grass_lib.errors import GrassError


def submit_cache(
    words: Sequence[str], store: Path, workers: int, resources: Resources, *, parallel: int | None = None
) -> list[JobRecord]:
    """Submits the workers of a store as an array, and after them a check of the whole.

    All workers write to the one folder, each its own shards, so nothing has to be merged; a worker that is queued
    again goes on with the first of its shards that is missing.

    Args:
        words: The command behind ``grass``, without ``--worker``.
        store: Folder of the store.
        workers: How many.
        resources: What each asks for; the check asks for no GPU.
        parallel: How many workers run at a time; None takes it from the resources.

    Returns:
        The jobs, the check last.

    Raises:
        UsageError: Slurm would not take a job; nothing was submitted.
        GrassError: Jobs of an earlier call still fill this store, or Slurm does not answer.
    """
    store = store.resolve()
    busy = [
        state.job.id for state in states([job for job in latest_jobs() if job.target == str(store)]) if state.active
    ]
    if busy:
        raise GrassError(
            f"jobs {', '.join(busy)} already fill the store {store}; wait for them (`grass jobs wait`), or cancel them "
            f"(`grass jobs cancel {' '.join(busy)}`)"
        )
    resources = replace(resources, parallel=parallel or resources.parallel)
    check = replace(resources, gpus="0", parallel=None)
    for asked in (resources, check):
        check_resources(asked, f"the store {store.name}")
    parts = [
        Task(CACHE, f"{store.name} {worker}/{workers}", store, (*words, "--worker", f"{worker}/{workers}"))
        for worker in range(workers)
    ]
    jobs = submit(parts, resources, name="grass-cache")
    last = Task(CHECK, f"{store.name} check", store, ("store", "verify", str(store), "-q"))
    return [*jobs, *submit([last], check, name="grass-check", after=jobs[0].id.partition("_")[0])]
