"""A small deterministic store that all tests here share.

Also a program: ``store_tools.py FOLDER [KILL [DTYPE]]`` writes it.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from grass_lib.store import GradientStore

# Not in alphabetical order, and of sizes that leave parts unaligned to anything.
LAYERS = {"h.10.mlp": 5, "h.2.attn": 12, "head": 3}
FINGERPRINT = {"model": "abc", "data": {"sha256": "d0", "rows": 75}, "seed": 3}
N_SAMPLES, SHARD_SIZE = 75, 8


def create(path, **changes):
    arguments = {
        "layers": LAYERS,
        "n_samples": N_SAMPLES,
        "shard_size": SHARD_SIZE,
        "dtype": torch.bfloat16,
        "fingerprint": FINGERPRINT,
        "source": {"experiment": "toy"},
        **changes,
    }
    return GradientStore.create(path, **arguments)


def shard(store, number):
    """The rows of one shard, which follow from its number and the layer alone."""
    rows = len(store.shard_rows(number))
    return {
        name: torch.randn(rows, size, generator=torch.Generator().manual_seed(1000 * number + size)).to(store.row_dtype)
        for name, size in store.layers.items()
    }


def fill(store, worker=0, n_workers=1):
    numbers = store.missing(worker, n_workers)
    with store.writer(worker=worker, n_workers=n_workers) as writer:
        for number in numbers:
            writer.submit(number, shard(store, number))
    return numbers


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def contents(folder):
    """All files of a folder, hidden ones included."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _kill_self(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at(kind, count):
    """Arranges for this process to be killed within the given call, half done where that is possible."""
    import grass_lib.store.shards as shards

    state = {"left": count}

    def due():
        state["left"] -= 1
        return state["left"] == 0

    if kind == "write":
        blocks = shards._blocks

        def stopping(tensor):
            for block in blocks(tensor):
                if due():
                    yield block[: len(block) // 2]
                    _kill_self()
                yield block

        shards._blocks = stopping
    elif kind == "fsync":
        fsync = os.fsync

        def sync(handle):
            if due():
                _kill_self()
            return fsync(handle)

        os.fsync = sync
    elif kind in ("before-rename", "after-rename"):
        replace = Path.replace

        def rename(self, target):
            now = due()
            if now and kind == "before-rename":
                _kill_self()
            result = replace(self, target)
            if now:
                _kill_self()
            return result

        Path.replace = rename
    elif kind != "none":
        threading.Thread(target=lambda: (time.sleep(count / 1000), _kill_self()), daemon=True).start()


def main():
    if len(sys.argv) > 2:
        kind, count = sys.argv[2].split("=")
        _kill_at(kind, int(count))
    random.seed(0)
    dtype = sys.argv[3] if len(sys.argv) > 3 else "bfloat16"
    store = create(sys.argv[1], n_samples=24 * SHARD_SIZE - 3, dtype=dtype)
    numbers = fill(store)
    print("wrote", *numbers)


if __name__ == "__main__":
    main()
