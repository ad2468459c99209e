"""Compresses a store and is killed at a step: ``compress_program.py STORE INTO rename|fsync STEP``."""

import os
import signal
import sys
from pathlib import Path


def main() -> None:
    store, into, kind, step = sys.argv[1:]
    left = int(step)

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, rename = os.fsync, Path.replace

    def counted_fsync(handle):
        if kind == "fsync":
            count()
        return fsync(handle)

    def counted_rename(self, target):
        if kind == "rename":
            count()
        return rename(self, target)

    from grass_lib.attribution import compress

    os.fsync = counted_fsync
    Path.replace = counted_rename
    compress(store, into, dtype="int8", rank=4, progress=False)


if __name__ == "__main__":
    main()
