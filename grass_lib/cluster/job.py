"""What runs on a node: one ``grass`` command line, which a user could type there as well.

submitit pickles the object below into its own folder and loads it on the node. It holds nothing but text, and nothing
that a job sends back is ever unpickled here: how a job ended is read from its exit stamp, from Slurm, and from what the
command wrote.

When a time limit or pre-emption comes near, Slurm sends SIGUSR2; submitit then queues the job again and ends this
process, and the next attempt goes on from what is on the disk. When Slurm itself ends a job (pre-emption without that
signal, ``scontrol requeue``, ``scancel``) it sends SIGTERM to all processes and SIGKILL later; such an end leaves no
stamp.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAMP = ".exit"
# Longer than the runner takes to stop a kernel, shorter than Slurm waits before it kills.
STOP_SECONDS = 25.0
# After SIGTERM has ended the command, SIGUSR2 may still be on its way.
SIGNAL_SECONDS = 5.0
_TERMINATED = (128 + signal.SIGTERM, -signal.SIGTERM)


def stamp_path(folder: Path, job_id: str) -> Path:
    """Where a job that came to its own end says its exit code."""
    return folder / f"{job_id}{STAMP}"


@dataclass(frozen=True)
class ClusterJob:
    """A command line as a submitit task that can be queued again.

    Attributes:
        words: The words behind ``grass``.
        folder: Where the command starts.
        fixed: Environment variables that the command must have.
        fallback: Environment variables for where the node has none of that name: lines of ``setup`` win over them.
    """

    words: tuple[str, ...]
    folder: str
    fixed: Mapping[str, str]
    fallback: Mapping[str, str]

    def __call__(self) -> None:
        """Runs the command; ends this process with its exit code unless that is 0."""
        import submitit

        environment = submitit.JobEnvironment()
        stamp = stamp_path(environment.paths.folder, environment.job_id)
        stamp.unlink(missing_ok=True)
        code = self._run()
        if code in _TERMINATED:
            time.sleep(SIGNAL_SECONDS)
            sys.exit(_TERMINATED[0])
        _write(stamp, f"{code}\n")
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """What to queue in place of a job that has to go: the same once more."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _run(self) -> int:
        # Slurm signals every process of the job. The command must not die of the signal that is meant for this process,
        # or its death would be taken for a failure before the job is queued again; the mask is inherited.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "grass_lib", *self.words],
                cwd=self.folder,
                env={**self.fallback, **os.environ, **self.fixed},
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _write(stamp: Path, text: str) -> None:
    temporary = stamp.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(stamp)
