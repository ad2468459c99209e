"""Starts the processes of `grass bench scaling` with torchrun, and collects what they wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grass_lib
from grass_lib.bench.scaling_shapes import Plan

PROGRAM = "grass_lib.bench.scaling_rank"
_TAIL = 4000


@dataclass(frozen=True)
class Ended:
    """What came of a launch.

    Attributes:
        code: Exit code of torchrun; -9 where it ran past its time.
        seconds: It took.
        finished: When it was over, seconds since the epoch.
        results: What each rank wrote, in their order; of a rank that failed as far as it came.
        text: End of what all of them said.
    """

    code: int
    seconds: float
    finished: float
    results: list[dict[str, Any]]
    text: str


def launch(plan: Plan, task: str, world: int, *, timeout: float) -> Ended:
    """Runs a task on some ranks and waits for it; the environment is passed on as it is.

    Args:
        plan: What the ranks are told; its folder must exist.
        task: One of `grass_lib.bench.scaling_rank.TASKS`.
        world: Number of ranks.
        timeout: Seconds after which all of them are killed.
    """
    path, log = plan.folder / f"plan-{task}-{world}.json", plan.folder / f"log-{task}-{world}.txt"
    for rank in range(world):
        result_path(plan.folder, task, world, rank).unlink(missing_ok=True)
    replace(plan, launched=time.time()).write(path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={world}", "-m", PROGRAM, str(path), task]
    start = time.perf_counter()
    with log.open("wb") as file:
        # A session of its own, so that a launch that hangs can be ended with all its ranks.
        process = subprocess.Popen(command, env=_environment(), stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = -9
            file.write(f"\nstopped after {timeout:.0f} s\n".encode())
    results = [_read(result_path(plan.folder, task, world, rank)) for rank in range(world)]
    text = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    return Ended(code, time.perf_counter() - start, time.time(), results, text)


def result_path(folder: Path, task: str, world: int, rank: int) -> Path:
    """The file in which a rank leaves its figures."""
    return folder / f"result-{task}-{rank}-of-{world}.json"


def keep(path: Path) -> Callable[[dict[str, Any]], None]:
    """Writes values to a file; it is whole at every moment."""

    def write(values: dict[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)

    return write


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _environment() -> dict[str, str]:
    root = str(Path(grass_lib.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH")
    given = {**os.environ, "PYTHONPATH": root if not known else os.pathsep.join([root, known])}
    # The same for one rank and for several: torchrun would set 1 for several alone.
    given.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 4)))
    return given
