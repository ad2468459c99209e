import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import store_tools
import torch
from store_tools import FINGERPRINT, contents, create, fill, same, shard

import grass_lib.store.merging as merging
from grass_lib.errors import UsageError
from grass_lib.store import GradientStore, StoreError


@pytest.fixture
def store(tmp_path):
    result = create(tmp_path / "store")
    fill(result)
    return result


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("number", [0, 4, 9])
def test_every_flipped_bit_is_found_and_mended(store, number):
    before = contents(store.path)
    data, note = store.path / f"shard_{number:05d}.safetensors", store.path / f"shard_{number:05d}.json"
    size, notes = data.stat().st_size, note.stat().st_size
    places = [(data, at) for at in (0, 3, 8, 20, 60, size // 2, size - 2, size - 1)]
    for path, position in [*places, *((note, at) for at in range(notes))]:
        flip(path, position)
        problems = store.verify(progress=False)
        assert [(problem.number, problem.kind) for problem in problems] == [(number, "damaged")], (path.name, position)
        assert data.name in problems[0].message
        path.write_bytes(before[path.name])
    flip(data, size - 1)
    store.drop(number)
    assert store.missing() == [number]
    store.write(number, shard(store, number))
    assert contents(store.path) == before
    assert store.verify(progress=False) == []


def test_lengths_and_absent_files(store):
    before = contents(store.path)
    data, note = store.path / "shard_00002.safetensors", store.path / "shard_00002.json"
    for path in (data, note):
        for content in (before[path.name] + b"\n", before[path.name][:-1], b""):
            path.write_bytes(content)
            assert [problem.kind for problem in store.verify(progress=False)] == ["damaged"]
            with pytest.raises(StoreError, match=r"shard_00002.* is damaged"):
                store.read(2)
        path.unlink()
        assert store.missing() == [2]
        assert [problem.kind for problem in store.verify(progress=False)] == ["missing"]
        path.write_bytes(before[path.name])
    data.unlink()
    data.mkdir()
    assert [problem.kind for problem in store.verify(progress=False)] == ["unreadable"]
    data.rmdir()
    data.write_bytes(before[data.name])


def test_reading_says_what_a_header_says(store):
    path = store.path / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16","shape":[8,3]', b'"F16" ,"shape":[8,3]'))
    with pytest.raises(StoreError, match=r"header says .*'F16'.* of layer head, expected .*'BF16'"):
        store.read(1)


def test_shards_of_another_store_or_place_are_found(store, tmp_path):
    other = create(tmp_path / "other", fingerprint={**FINGERPRINT, "seed": 5})
    fill(other)
    for source, number in ((other, 3), (store, 4)):
        for kind in ("json", "safetensors"):
            shutil.copy(source.path / f"shard_{number:05d}.{kind}", store.path / f"shard_00003.{kind}")
        with pytest.raises(StoreError, match=r"it says .*expected"):
            store.read(3)
        with pytest.raises(StoreError, match=r"it says .*expected"):
            list(store.stream())
        assert [problem.number for problem in store.verify(progress=False)] == [3]


def test_rewriting_a_shard_never_leaves_an_old_note_beside_new_rows(store, monkeypatch):
    def stop(self, target):
        raise OSError(5, "Input/output error")

    rows = {name: tensor + 1 for name, tensor in shard(store, 3).items()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        with pytest.raises(StoreError, match="Input/output error"):
            store.write(3, rows)
    assert store.missing() == [3]
    store.write(3, rows)
    assert same(store.read(3), rows)
    assert store.verify(progress=False) == []


@pytest.mark.parametrize("link", [True, False])
def test_merge_of_three_workers_is_the_store_of_one(store, tmp_path, monkeypatch, link):
    if not link:

        def refuse(source, target):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(merging.os, "link", refuse)
    parts = [create(tmp_path / f"part{worker}") for worker in range(3)]
    for worker, part in enumerate(parts):
        assert fill(part, worker, 3) == list(range(worker, 10, 3))
    merged = GradientStore.merge([parts[2], str(parts[0].path), parts[1].path], tmp_path / "merged")
    assert contents(merged.path) == contents(store.path)
    assert merged.verify(progress=False) == []
    shared = (merged.path / "shard_00004.safetensors").samefile(parts[1].path / "shard_00004.safetensors")
    assert shared == link
    before = contents(parts[1].path)
    merged.drop(4)
    merged.write(4, {name: tensor * 2 for name, tensor in shard(store, 4).items()})
    assert contents(parts[1].path) == before, "a source never changes with the result"


def test_merge_goes_on_after_a_kill(store, tmp_path):
    parts = [create(tmp_path / f"part{worker}") for worker in range(2)]
    for worker, part in enumerate(parts):
        fill(part, worker, 2)
    merged = GradientStore.merge([parts[0]], tmp_path / "merged", allow_missing=True)
    # As left between the link and its note, and between link and rename.
    os.link(parts[1].path / "shard_00001.safetensors", merged.path / "shard_00001.safetensors")
    os.link(parts[1].path / "shard_00003.safetensors", merged.path / ".shard_00003.safetensors.tmp")
    GradientStore.merge(parts, merged.path)
    assert contents(merged.path) == contents(store.path)


def test_merge_refusals(store, tmp_path, monkeypatch):
    part = create(tmp_path / "part")
    fill(part, 1, 3)
    with pytest.raises(StoreError, match="7 of 10 shards are missing in the gradient store: 0, 2-3, 5-6, 8-9"):
        GradientStore.merge([part], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert GradientStore.merge([part], tmp_path / "some", allow_missing=True).missing() == [0, 2, 3, 5, 6, 8, 9]
    other = create(tmp_path / "other", fingerprint={**FINGERPRINT, "seed": 5})
    with pytest.raises(StoreError, match=r"other holds .*seed is 5 there, 3 here"):
        GradientStore.merge([store, other], tmp_path / "merged")
    with pytest.raises(StoreError, match=r"other holds .*seed is 5 there, 3 here"):
        GradientStore.merge([store], other.path)
    part.write(1, {name: tensor + 1 for name, tensor in shard(part, 1).items()})
    with pytest.raises(StoreError, match=r"shard 1 differs between gradient stores: .*SHA-256 \w+; .*SHA-256"):
        GradientStore.merge([store, part], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(StoreError, match="shard 1 differs"):
        GradientStore.merge([store], part.path)
    with pytest.raises(UsageError, match="merge without sources"):
        GradientStore.merge([], tmp_path / "merged")
    flip(store.path / "shard_00002.safetensors", 300)
    monkeypatch.setattr(merging.os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "")))
    with pytest.raises(StoreError, match=r"shard_00002.safetensors is damaged: its SHA-256 is \w+, its note says"):
        GradientStore.merge([store], tmp_path / "merged")
    assert create(tmp_path / "merged").missing() == list(range(2, 10))
    assert not [name for name in contents(tmp_path / "merged") if name.startswith(".")]


def run_child(folder, *kill):
    command = [sys.executable, store_tools.__file__, str(folder), *kill]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


KILLS = [
    ("fsync=1", "fsync=2", "before-rename=1", "after-rename=1"),  # the manifest, one after the other
    ("write=4",),
    ("write=40", "write=20"),
    ("fsync=23",),  # a data file
    ("fsync=24",),  # the folder after it
    ("fsync=25",),  # a note
    ("before-rename=10",),  # a data file
    ("before-rename=11",),  # a note
    ("after-rename=10", "after-rename=11"),
    ("write=60", "fsync=6", "before-rename=3"),
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    done = run_child(folder)
    assert done.returncode == 0, done.stderr
    return contents(folder)


def restarted_is_whole(folder, uninterrupted):
    finished = {path.name for path in folder.glob("shard_*.json")} if folder.exists() else set()
    done = run_child(folder)
    assert done.returncode == 0, done.stderr
    wrote = {f"shard_{int(number):05d}.json" for number in done.stdout.split()[1:]}
    assert wrote == {name for name in uninterrupted if name.startswith("shard") and "json" in name} - finished
    assert contents(folder) == uninterrupted


@pytest.mark.system
@pytest.mark.parametrize("kills", KILLS, ids=",".join)
def test_killed_at_a_step(tmp_path, uninterrupted, kills):
    for kill in kills:
        assert run_child(tmp_path / "store", kill).returncode == -signal.SIGKILL
    restarted_is_whole(tmp_path / "store", uninterrupted)


@pytest.mark.system
def test_killed_at_random_times(tmp_path, uninterrupted):
    """Kills are spread over the writing itself: the time is counted from the start of the program proper."""
    times, killed = random.Random(7), 0
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        code = run_child(folder, f"after={times.randrange(1, 60)}").returncode
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        restarted_is_whole(folder, uninterrupted)
    assert killed >= 5


def test_stream_and_writer_use_bounded_memory(tmp_path):
    """A store of 64 MB is written and read by a process that may grow by a fraction of it."""
    script = """
import resource, sys, torch
from grass_lib.store import GradientStore
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
store = GradientStore.create(sys.argv[1], layers={f"l{i}": 1024 for i in range(4)}, n_samples=8192, shard_size=512,
                             dtype=torch.bfloat16, fingerprint={})
def rows():
    return {name: torch.ones(512, 1024, dtype=torch.bfloat16) for name in store.layers}
store.write(0, rows()); next(store.stream(shards=[0]))
start = peak()
with store.writer() as writer:
    for number in range(1, 16):
        writer.submit(number, rows())
total = sum(float(tensor[0, 0]) for _, _, tensor in store.stream())
print(int(total), peak() - start)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "store")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, growth = map(int, done.stdout.split())
    assert total == 64
    assert growth < 24 << 20, "two shards of 4 MB, eight buffers of 1 MB"
    assert torch.bfloat16.itemsize * 8192 * 4096 == 64 << 20
