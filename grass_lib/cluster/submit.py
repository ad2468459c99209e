"""Hands commands to Slurm through submitit, one array for all that ask for the same."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grass_lib.cluster.job import ClusterJob
from grass_lib.cluster.queue import call
from grass_lib.cluster.records import JobRecord, jobs_folder, write_submission
from grass_lib.cluster.settings import Resources
from grass_lib.errors import GrassError, UsageError
from grass_lib.project import package_folder, project_root, runs_root

# Between the signal that a time limit comes near and the end: stopping a kernel and queueing again.
SIGNAL_SECONDS = 120


@dataclass(frozen=True)
class Task:
    """One command to submit; the attributes are those of `JobRecord`."""

    kind: str
    name: str
    target: Path
    words: tuple[str, ...]


def check_resources(resources: Resources, what: str) -> None:
    """Asks Slurm whether it would take a job, without submitting one.

    Args:
        resources: What the job would ask for.
        what: Whose job it is, for the message.

    Raises:
        UsageError: It would not; Slurm's own words are in the message.
    """
    flags = {name: getattr(resources, name) for name in ("partition", "account", "qos", "constraint")}
    flags |= {"time": resources.minutes, "cpus-per-task": resources.cpus, "mem": resources.memory, "ntasks": 1}
    if resources.gpus != "0":
        flags["gpus-per-node"] = resources.gpus
    flags |= dict(resources.sbatch)
    words = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in flags.items() if value is not None]
    try:
        done = subprocess.run(
            ["sbatch", "--test-only", *words, "--wrap=true"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise GrassError(f"sbatch does not work here: {error}; see whether Slurm answers: sinfo") from error
    limit = time_limit(resources.partition)
    if done.returncode:
        text = "; ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip())
    elif limit is not None and resources.minutes > limit:
        # Most clusters would queue such a job, where it waits for ever.
        text = f"the partition's time limit is {limit} minutes, and {resources.minutes} are asked for"
    else:
        return
    raise UsageError(
        f"Slurm would not take the job of {what} ({resources.shown()}): {text}; nothing was submitted. Correct "
        "slurm.toml or --slurm; `sinfo` and `sacctmgr show assoc` list what there is"
    )


def time_limit(partition: str | None) -> int | None:
    """Longest time in minutes in a partition, or in the default one; None where there is no limit, or it is unknown."""
    lines = [line.partition("|") for line in call(["sinfo", "--noheader", "--format=%P|%l"]).splitlines()]
    limits = {name.strip(): limit.strip() for name, _, limit in lines}
    wanted = (partition or "").split(",") if partition else [name for name in limits if name.endswith("*")]
    found = [limits.get(name) or limits.get(f"{name}*", "") for name in wanted]
    matches = [re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text) for text in found]
    minutes = []
    for match in matches:
        if match is None:
            return None
        days, hours, rest, _ = (int(part or 0) for part in match.groups())
        minutes.append((days * 24 + hours) * 60 + rest)
    return max(minutes, default=None)


def submit(tasks: Sequence[Task], resources: Resources, *, name: str, after: str | None = None) -> list[JobRecord]:
    """Submits one array, or a single job, and keeps a record of it.

    Args:
        tasks: What to run, one job each.
        resources: What each asks for.
        name: Of the jobs, as ``squeue`` shows it.
        after: Id of an array that has to end well first.

    Returns:
        One record per task.

    Raises:
        GrassError: Slurm refused.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder = jobs_folder()
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=resources.requeues)
    executor.update_parameters(**_parameters(resources, len(tasks), name, after))
    try:
        with executor.batch():
            jobs = [executor.submit(_cluster_job(task)) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        raise GrassError(
            f"Slurm did not take the jobs of {name}: {' '.join(str(error).split())}; `grass jobs list` shows what runs"
        ) from error
    now = datetime.now(UTC).isoformat(timespec="seconds")
    records = [
        JobRecord(job.job_id, task.kind, task.name, str(task.target), task.words, str(job.paths.stdout), now)
        for job, task in zip(jobs, tasks, strict=True)
    ]
    write_submission(records, resources.to_json())
    return records


def _cluster_job(task: Task) -> ClusterJob:
    passed = ("GRASS_DATA", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    fallback = {name: os.environ[name] for name in passed if name in os.environ}
    fixed = {"GRASS_ROOT": str(project_root()), "GRASS_RUNS": str(runs_root())}
    return ClusterJob(task.words, str(Path.cwd()), fixed, fallback)


def _parameters(resources: Resources, count: int, name: str, after: str | None) -> Mapping[str, Any]:
    package = shlex.quote(str(package_folder().parent))
    more: dict[str, Any] = {"requeue": True}
    more |= {option: True if value == "" else value for option, value in resources.sbatch}
    if after is not None:
        more |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    return {
        "job_name": name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "time": resources.minutes,
        "gpus_per_node": None if resources.gpus == "0" else resources.gpus,
        "cpus_per_task": resources.cpus,
        "mem": resources.memory,
        "array_parallelism": resources.parallel or count,
        "signal_delay_s": SIGNAL_SECONDS,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's own, which a cluster may refuse
        # submitit has to find this package on the node before any command runs.
        "setup": [*resources.setup, f"export PYTHONPATH={package}${{PYTHONPATH:+:$PYTHONPATH}}"],
        "additional_parameters": more,
        # A step does not inherit the job's cores since Slurm 22.05, and every attempt adds to one log.
        "srun_args": [f"--cpus-per-task={resources.cpus}", "--open-mode=append"],
    }
