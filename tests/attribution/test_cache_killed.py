"""SIGKILL while gradients are cached: the next run goes on, and the store ends with the same bytes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "store")]

import killed_cache  # noqa: E402
import store_tools  # noqa: E402

from grass_lib.store import GradientStore  # noqa: E402

pytestmark = pytest.mark.system
# Inside a write, at an fsync, before and after a rename (each shard has two of the latter three), and at any time.
MOMENTS = ("write=3", "write=40", "fsync=2", "fsync=31", "before-rename=5", "before-rename=30", "after-rename=4")
TIMES = ("time=2500", "time=2700", "time=2900")  # ms after the start of Python


def run(folder, *kill):
    command = [sys.executable, str(Path(killed_cache.__file__)), str(folder), *kill]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert GradientStore.open(folder).n_shards == 24
    return folder


def visible(folder):
    return {name: content for name, content in store_tools.contents(folder).items() if not name.startswith(".lock")}


@pytest.mark.parametrize("moment", [*MOMENTS, *TIMES])
def test_a_killed_cache_ends_with_the_same_bytes(moment, uninterrupted, tmp_path):
    folder = tmp_path / "store"
    killed = run(folder, moment)
    if moment in MOMENTS:
        assert killed.returncode == -signal.SIGKILL
    finished = len(list(folder.glob("shard_*.json"))) if folder.is_dir() else 0
    again = run(folder)
    assert again.returncode == 0, again.stderr
    # Only what was missing was computed.
    computed = int(again.stdout.split()[-1])
    assert computed == killed_cache.N - min(killed_cache.N, finished * killed_cache.SHARD)
    assert visible(folder) == visible(uninterrupted)
    assert GradientStore.open(folder).verify(progress=False) == []


def test_scores_after_a_kill_are_those_without(uninterrupted, tmp_path):
    folder = tmp_path / "store"
    assert run(folder, "fsync=21").returncode == -signal.SIGKILL
    killed_cache.influence(folder).cache(killed_cache.batches())
    queries = killed_cache.batches()[:2]
    first = killed_cache.influence(folder).attribute(queries, damping=[1e-3, 0.1])
    whole = killed_cache.influence(uninterrupted).attribute(queries, damping=[1e-3, 0.1])
    assert torch.equal(first, whole)
