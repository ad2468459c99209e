"""Runs one system in the Python that has it, and brings its answers back."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

from grass_lib.baselines.environment import baselines_python, worker_environment
from grass_lib.baselines.exchange import read_outcome, write_job
from grass_lib.baselines.systems import SYSTEMS, Options
from grass_lib.baselines.workload import Outcome, Workload
from grass_lib.errors import BaselineError, UsageError
from grass_lib.project import package_folder

LOG, FACTS, WORK = "log.txt", "facts.json", "work.txt"
_TAIL = 12


def run_system(
    system: str,
    workload: Workload,
    options: Sequence[Options],
    *,
    folder: Path | None = None,
    timeout: float = 3600.0,
    python: Path | None = None,
    facts: bool = False,
) -> list[Outcome]:
    """Runs a system on a workload, once for each set of options, in one process.

    Args:
        system: Key of ``SYSTEMS``.
        workload: What it works on.
        options: Of the system's own class.
        folder: Where the exchange happens and the log stays; answers that are there already, of the same work and
            source, are used again, so that a run that was killed goes on with the options that it lacks. None for a
            temporary one.
        timeout: Seconds after which the process is killed.
        python: Another Python than that of ``.venv-baselines``; it needs the system's package.
        facts: Whether the system's facts are checked too; they come with the first outcome's details as ``facts``.

    Returns:
        One outcome per set of options.

    Raises:
        UsageError: The system is not known or not installed, or options are of another system.
        BaselineError: The worker failed or was killed; the message ends with its log.
    """
    if system not in SYSTEMS:
        raise UsageError(f"system is {system!r}; expected one of {', '.join(SYSTEMS)}")
    for item in options:
        if item.system != system:
            raise UsageError(f"options are of {item.system}, and the system is {system}; expected its own options")
    runner = python or baselines_python()
    place: AbstractContextManager[str] = nullcontext(str(folder)) if folder else tempfile.TemporaryDirectory()
    with place as name:
        home = Path(name).resolve()
        home.mkdir(parents=True, exist_ok=True)
        digest, work = write_job(home, system, workload, options, facts) + package_digest(), home / WORK
        if not (work.is_file() and work.read_text(encoding="utf-8") == digest):
            for old in (*home.glob("outcome-*"), home / FACTS):
                old.unlink(missing_ok=True)
            work.write_text(digest, encoding="utf-8")
        wanted = [home / f"outcome-{number}.json" for number in range(len(options))] + [home / FACTS] * facts
        if not all(path.is_file() for path in wanted):
            command = [str(runner), "-m", "grass_lib.baselines.worker", str(home)]
            code = _execute(command, home, timeout, workload.device)
            if code != 0:
                raise BaselineError(_story(SYSTEMS[system].title, code, timeout, home / LOG, kept=folder is not None))
        found = [read_outcome(home, number) for number in range(len(options))]
        if facts and found:
            seen = json.loads((home / FACTS).read_text(encoding="utf-8"))
            found[0] = Outcome(**{**vars(found[0]), "details": {**found[0].details, "facts": seen}})
        return found


@cache
def package_digest() -> str:
    """SHA-256 of this library's source: answers of another version are not used again."""
    digest, package = hashlib.sha256(), package_folder()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _execute(command: list[str], home: Path, timeout: float, device: str) -> int | None:
    """Exit code of a worker; None where it was stopped for taking too long. Its children go with it."""
    with (home / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=worker_environment(device),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _story(title: str, code: int | None, timeout: float, log: Path, *, kept: bool) -> str:
    """What happened, and the end of the log."""
    if code is None:
        what = f"took longer than {timeout:.0f} s and was stopped; give it more time or less work"
    elif code < 0:
        cause = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
        what = f"was killed by {signal.Signals(-code).name}{cause}; give it less work"
    else:
        what = f"ended with exit code {code}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    tail = "\n".join(lines[-_TAIL:]) or "(empty)"
    where = f" {log.name} in {log.parent.name}/" if kept else ""
    return f"the worker of {title} {what}. The end of its log{where}:\n{tail}"
