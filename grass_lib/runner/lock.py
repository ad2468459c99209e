"""One runner per run folder: a lock file with the owner's process id."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from grass_lib.errors import BusyError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
_BUSY = (errno.EAGAIN, errno.EACCES)


def _owner(file: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(owner: dict[str, object]) -> bool:
    """Whether the owner still runs; somebody on another machine, or unknown, is taken to be alive."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:  # a process that has ended but was not yet waited for still has its number
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state != "Z"


@contextmanager
def run_lock(folder: Path, *, patience: float = 20.0) -> Iterator[int]:
    """Holds the lock of a run folder.

    The operating system drops the lock when its holders end, however they end, so a file that was left behind is simply
    taken over. Where the owner was killed and its kernel is still on the way out, this waits for it.

    Args:
        folder: the run's folder; it must exist.
        patience: longest wait in s for the rest of a killed owner.

    Yields:
        The open file, for children that have to hold the lock as well.

    Raises:
        BusyError: another process executes this run.
    """
    path = folder / LOCK_FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in _BUSY:
                    raise
            owner = _owner(file)
            if _alive(owner) or time.monotonic() > deadline:
                raise BusyError(
                    f"run {folder.name} is being executed by process {owner.get('pid', 'unknown')} on "
                    f"{owner.get('host', 'an unknown host')} since {owner.get('since', 'an unknown time')}; "
                    "wait for it, or end that process and run again"
                )
            time.sleep(0.1)
        if os.fstat(file).st_size:
            logger.info("%s: took over the lock of a runner that did not end well", folder.name)
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(content).encode(), 0)
        try:
            yield file
        finally:
            # Emptied, not removed: another process may already wait on this very file.
            with suppress(OSError):
                os.ftruncate(file, 0)
    finally:
        os.close(file)
