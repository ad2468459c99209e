"""Executes planned runs, one process each, and stamps what came out."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grass_lib.errors import BusyError, GrassError
from grass_lib.project import package_folder
from grass_lib.report.environment import cpu_count
from grass_lib.report.files import disk_full_message, file_sha256, is_disk_full, json_bytes, write_atomic
from grass_lib.runner.lock import run_lock
from grass_lib.runner.planning import PlannedRun, why_pending
from grass_lib.runner.verify import (
    INTERRUPTED,
    LOG,
    NOTEBOOK,
    PART,
    RECORD,
    STATUS,
    Status,
    in_one_sentence,
    verify_run,
)

logger = logging.getLogger(__name__)

PREVIOUS = "previous"
STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Outcome:
    """How one planned run ended.

    Attributes:
        planned: the run.
        state: ``done``, ``skipped``, ``failed``, ``interrupted`` or, where another process executes it, ``busy``.
        message: what failed, or why it was skipped.
        seconds: wall-clock seconds.
    """

    planned: PlannedRun
    state: str
    message: str = ""
    seconds: float = 0.0

    @property
    def log(self) -> Path:
        """The run's log."""
        return self.planned.folder / LOG


def _set_aside(folder: Path) -> None:
    """Keeps the last finished run until a new one is finished; what is in the folder is then always of one attempt."""
    aside = folder / PREVIOUS
    if (folder / STATUS).exists() and not verify_run(folder):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in (NOTEBOOK, RECORD, LOG, STATUS):
            if (folder / name).exists():
                (folder / name).replace(aside / name)
    for name in (STATUS, NOTEBOOK, RECORD, PART, LOG):
        (folder / name).unlink(missing_ok=True)


def _environment(planned: PlannedRun, jobs: int) -> dict[str, str]:
    paths = [str(package_folder().parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "GRASS_ROOT": str(planned.root),
        "GRASS_RUNS": str(planned.folder.parent),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    environment.setdefault("TQDM_MININTERVAL", "2")
    environment.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    # Threads that wait for work by spinning cost ten times the work where anything else uses the cores.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if jobs > 1:  # kernels that each take every core only get into each other's way
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // jobs)))
    return environment


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends a worker and its kernel: asks first, so that the kernel goes with it."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _run_worker(
    planned: PlannedRun, lock: int, stop: threading.Event, *, position: int, progress: bool, jobs: int
) -> tuple[int, str | None]:
    """Exit code of the process that executed the notebook, and what failed."""
    parameters = {name: planned.parameters[name] for name in planned.changed}
    task = {
        "run_id": planned.run_id,
        "folder": str(planned.folder),
        "template": str(planned.template),
        "root": str(planned.root),
        "log": str(planned.folder / LOG),
        "parameters": {**parameters, "scale": planned.scale, "run_id": planned.run_id},
        "position": position,
        "progress": progress,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "grass_lib.runner.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=planned.root,
        env=_environment(planned, jobs),
        pass_fds=(
            lock,
        ),  # the worker holds the lock too, so that nobody starts while a killed runner's kernel still ends
        start_new_session=True,  # Ctrl-C reaches the runner only, which then stops each worker in order
    )
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise GrassError("the worker process has no pipes; run again")
    try:
        try:
            stdin.write(json.dumps(task) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # the worker is already gone; its exit code says so
        while process.poll() is None:
            if stop.wait(0.1):
                _stop(process)
                return INTERRUPTED, "interrupted; run the same command again to go on"
        answer = stdout.read().strip()
    finally:
        if process.poll() is None:
            _stop(process)
        stdin.close()
        stdout.close()
    code = process.returncode
    if answer:
        return code, json.loads(answer)["error"]
    if code < 0:
        return code, f"the process that executes the notebook was killed by {signal.Signals(-code).name}"
    return code, f"the process that executes the notebook ended with exit code {code} without a word"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def execute_run(
    planned: PlannedRun,
    *,
    force: bool = False,
    stop: threading.Event | None = None,
    position: int = 0,
    progress: bool = True,
    jobs: int = 1,
    started: Callable[[PlannedRun], Any] = lambda planned: None,
) -> Outcome:
    """Executes one run unless an identical one is finished, and verifies it.

    Args:
        planned: the run.
        force: execute it even so.
        stop: set it from another thread to stop the run.
        position: line of its progress bar.
        progress: whether to show one.
        jobs: how many runs share this machine.
        started: called once nothing is in the way of the run.

    Returns:
        How it ended. Everything that happened to the run itself is in there, never raised.
    """
    start = time.perf_counter()

    def outcome(state: str, message: str = "") -> Outcome:
        return Outcome(planned, state, message, time.perf_counter() - start)

    if planned.finished and not force:
        return outcome("skipped", "an identical run is finished")
    if planned.left_out:
        return outcome("skipped", f"left out, {planned.left_out}")
    if planned.problems:
        return outcome("failed", "; ".join(planned.problems))
    try:
        planned.folder.mkdir(parents=True, exist_ok=True)
        with run_lock(planned.folder) as lock:
            if not force and not why_pending(planned):  # once more: somebody else may have finished it meanwhile
                return outcome("skipped", "an identical run is finished")
            started(planned)
            _set_aside(planned.folder)
            begin = _now()
            code, error = _run_worker(
                planned, lock, stop or threading.Event(), position=position, progress=progress, jobs=jobs
            )
            _stamp(planned, code, error, begin)
            if code == INTERRUPTED:
                return outcome("interrupted", error or "")
            problems = [error or f"exit code {code}"] if code else verify_run(planned.folder)
            if problems:
                return outcome("failed", in_one_sentence(problems))
            shutil.rmtree(planned.folder / PREVIOUS, ignore_errors=True)
            return outcome("done")
    except OSError as error:
        if is_disk_full(error):
            return outcome("failed", disk_full_message(planned.folder))
        return outcome(
            "failed", f"the run's folder cannot be used ({error}); set GRASS_RUNS to a folder that can be written"
        )
    except BusyError as error:
        return outcome("busy", str(error))
    except GrassError as error:
        return outcome("failed", str(error))


def _stamp(planned: PlannedRun, code: int, error: str | None, started: str) -> None:
    notebook = planned.folder / NOTEBOOK
    status = Status(
        run_id=planned.run_id,
        experiment=planned.experiment,
        scale=planned.scale,
        exit_code=code,
        started=started,
        ended=_now(),
        parameters=planned.parameters,
        changed=list(planned.changed),
        data_fingerprint=planned.data_fingerprint,
        template_sha256=planned.template_sha256,
        modules=planned.modules,
        notebook_sha256=file_sha256(notebook) if code == 0 and notebook.exists() else None,
        error=error,
    )
    write_atomic(planned.folder / STATUS, json_bytes(asdict(status)))


def run_all(
    planned: Sequence[PlannedRun],
    *,
    jobs: int = 1,
    force: bool = False,
    progress: bool = True,
    report: Callable[[Outcome], Any] = lambda outcome: None,
    started: Callable[[PlannedRun], Any] = lambda planned: None,
) -> list[Outcome]:
    """Executes a batch; one failure does not stop the others.

    Args:
        planned: the runs.
        jobs: how many at a time.
        force: execute also what is finished.
        progress: whether to show progress bars.
        report: called with each outcome as it comes.
        started: called, in a thread of the batch, with each run that begins.

    Returns:
        One outcome per run, in the order of ``planned``.

    Raises:
        KeyboardInterrupt: the batch was interrupted; every kernel has been stopped.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = {
            pool.submit(
                execute_run,
                item,
                force=force,
                stop=stop,
                position=place % max(1, jobs),
                progress=progress,
                jobs=min(jobs, len(planned)),
                started=started,
            ): place
            for place, item in enumerate(planned)
        }
        outcomes: dict[int, Outcome] = {}
        waiting = set(futures)
        try:
            while waiting:
                # Short waits: a signal is only handled between them.
                done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    outcomes[futures[future]] = future.result()
                    report(outcomes[futures[future]])
        except BaseException:
            stop.set()
            for future in waiting:
                future.cancel()
            raise
    return [outcomes[place] for place in range(len(planned))]


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Says which runs of a batch failed.

    Args:
        outcomes: Of the batch.

    Raises:
        GrassError: One is neither done nor skipped.
    """
    failed = [item.planned.run_id for item in outcomes if item.state not in ("done", "skipped", "busy")]
    if failed:
        raise GrassError(
            f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}; their logs are named above"
        )
    busy = [item.planned.run_id for item in outcomes if item.state == "busy"]
    if busy:
        raise GrassError(
            f"{len(busy)} of {len(outcomes)} runs are left to the processes that execute them: {', '.join(busy)}"
        )
