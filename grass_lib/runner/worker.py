"""The process that executes one notebook: ``python -m grass_lib.runner.worker``, started by `grass_lib.runner.execute`.

It reads its task as one line of JSON from standard input and keeps that open: when the runner ends, however it ends,
the input ends too and the kernel is stopped. All output goes to the log but the progress bar, which goes to the
terminal, and one line of JSON on standard output that says how it went.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
from nbclient.exceptions import CellControlSignal, CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillException, PapermillExecutionError

from grass_lib.errors import GrassError
from grass_lib.report.files import disk_full_message, is_disk_full, write_atomic
from grass_lib.report.scrub import scrub_text
from grass_lib.runner.clean import clean_notebook
from grass_lib.runner.status import Followed
from grass_lib.runner.verify import NOTEBOOK, PART

KERNEL_START_SECONDS = 120
GRACE_SECONDS = 10.0


def _follow_parent() -> None:
    """Ends this process, and with it the kernel, when the runner is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _last_cell(part: Path) -> str:
    """Number of the last code cell that was started, for the failures that papermill does not place."""
    try:
        cells = json.loads(part.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return "an unknown code cell"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    started = [place for place, cell in enumerate(code, 1) if cell["metadata"].get("papermill", {}).get("start_time")]
    return f"code cell {started[-1]}" if started else "the start"


def _error_text(error: BaseException, part: Path) -> str:
    """One sentence about a failure."""
    if isinstance(error, PapermillExecutionError):
        text = f"code cell {error.exec_count} raised {error.ename}: {error.evalue}"
        full = "No space left on device" in text or "[Errno 28]" in text
        return f"{text}; {disk_full_message(part.parent)}" if full else text
    if isinstance(error, DeadKernelError):
        return (
            f"the kernel died in {_last_cell(part)} (killed, out of memory, or ended by the code); "
            "look at the end of the log, and for memory at `dmesg`"
        )
    if isinstance(error, CellTimeoutError):
        return f"{_last_cell(part)} took too long"
    if isinstance(error, OSError) and is_disk_full(error):
        return disk_full_message(part.parent)
    return f"{type(error).__name__}: {error}"


def _execute(task: Mapping[str, Any], log: TextIO, terminal: TextIO) -> None:
    folder = Path(task["folder"])
    part = folder / PART
    template = nbformat.read(task["template"], as_version=4)
    bar = {
        "desc": task["run_id"],
        "file": terminal,
        "leave": True,
        "position": task["position"],
        "dynamic_ncols": True,
        # Cells take from no time to minutes: no time that is left could be told from their number.
        "bar_format": "{desc}: {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]",
    }
    show: Any = bar if task["progress"] else False  # papermill takes tqdm's options too, which its type does not say
    notebook = papermill.execute_notebook(
        template,
        str(part).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
        parameters=task["parameters"],
        kernel_name="python3",
        language="python",  # a template need not say it
        progress_bar=show,
        stdout_file=log,
        stderr_file=Followed(log) if task["progress"] else log,  # pyright: ignore[reportArgumentType]
        start_timeout=KERNEL_START_SECONDS,
        cwd=task["root"],
    )
    content = nbformat.writes(clean_notebook(notebook)).encode()
    write_atomic(folder / NOTEBOOK, content)
    part.unlink()


def main() -> int:
    """Executes the task; returns the exit code."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_follow_parent, daemon=True).start()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8")
    error_text = None
    with Path(task["log"]).open("a", encoding="utf-8", buffering=1) as log:
        # Also what kernels write past Python, down to the last words of a crash.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        logging.basicConfig(level=logging.INFO, stream=log, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            _execute(task, log, terminal)
        except (
            PapermillException,
            CellControlSignal,
            DeadKernelError,
            OSError,
            RuntimeError,
            ValueError,
            GrassError,
        ) as error:
            error_text = scrub_text(_error_text(error, Path(task["folder"]) / PART))
            logging.getLogger(__name__).error("%s", error, exc_info=not isinstance(error, PapermillException))
    answer.write(json.dumps({"error": error_text}) + "\n")
    answer.flush()
    return 0 if error_text is None else 1


if __name__ == "__main__":
    sys.exit(main())
