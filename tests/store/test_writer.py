import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from store_tools import contents, create, fill, same, shard

import grass_lib.store.store as store_module
from grass_lib.errors import UsageError
from grass_lib.store import MemoryStore, StoreError, lock


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "shard-writer"]


def test_submit_waits_while_the_writer_is_slow(tmp_path, monkeypatch):
    store = create(tmp_path)
    gate, started, done = threading.Semaphore(0), threading.Event(), []
    write = store_module.write_shard

    def slow(folder, manifest, number, tensors):
        started.set()
        gate.acquire()
        write(folder, manifest, number, tensors)

    monkeypatch.setattr(store_module, "write_shard", slow)

    def work():
        with store.writer(max_pending=2) as writer:
            for number in range(4):
                writer.submit(number, shard(store, number))
                done.append(number)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(5)
    time.sleep(0.1)
    assert done == [0, 1], "one in writing, one waiting"
    gate.release()
    time.sleep(0.1)
    assert done == [0, 1, 2]
    assert store.missing() == list(range(1, 10))
    for _ in range(3):
        gate.release()
    thread.join(5)
    assert done == [0, 1, 2, 3]
    assert store.missing() == list(range(4, 10))


def test_memory_may_be_used_again_after_max_pending_submits(tmp_path):
    store = create(tmp_path)
    buffers = [{name: torch.empty(8, size, dtype=store.dtype) for name, size in store.layers.items()} for _ in range(2)]
    with store.writer(max_pending=1) as writer:
        for number in range(9):
            tensors = buffers[number % 2]
            for name, rows in shard(store, number).items():
                tensors[name].copy_(rows)
            writer.submit(number, tensors)
    for number in range(9):
        assert same(store.read(number), shard(store, number))


def test_ready_is_called_in_the_writer_thread_before_the_rows_are_read(tmp_path):
    store = create(tmp_path)
    rows = {name: torch.zeros_like(tensor) for name, tensor in shard(store, 0).items()}
    names = []

    def ready():
        names.append(threading.current_thread().name)
        for name, tensor in shard(store, 0).items():
            rows[name].copy_(tensor)

    with store.writer() as writer:
        writer.submit(0, rows, ready)
    assert names == ["shard-writer"]
    assert same(store.read(0), shard(store, 0))


def failing_write(monkeypatch, at, error):
    write = store_module.write_shard

    def failing(folder, manifest, number, tensors):
        if number == at:
            raise error
        write(folder, manifest, number, tensors)

    monkeypatch.setattr(store_module, "write_shard", failing)


def submit(store, numbers, max_pending, seen):
    with store.writer(max_pending=max_pending) as writer:
        for number in numbers:
            seen.append(number)
            writer.submit(number, shard(store, number))


def test_errors_surface_at_the_next_submit(tmp_path, monkeypatch):
    store = create(tmp_path)
    failing_write(monkeypatch, 1, StoreError("no"))
    seen = []
    with pytest.raises(StoreError, match="no"):
        submit(store, range(10), 1, seen)
    assert seen in ([0, 1], [0, 1, 2])
    assert store.missing() == list(range(1, 10))
    assert not writers()


def test_errors_surface_at_the_end(tmp_path, monkeypatch):
    store = create(tmp_path)
    failing_write(monkeypatch, 1, StoreError("no"))
    with pytest.raises(StoreError, match="no"):
        submit(store, range(2), 2, [])
    assert store.missing() == list(range(1, 10))
    assert not writers()


def test_an_exception_in_the_block_stops_the_thread_and_keeps_what_was_submitted(tmp_path, monkeypatch):
    store = create(tmp_path)
    writer = None

    def work():
        nonlocal writer
        with store.writer() as writer:
            writer.submit(0, shard(store, 0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert not writers()
    assert store.missing() == list(range(1, 10))
    assert store.verify(progress=False)[0].number == 1
    with pytest.raises(UsageError, match="a writer that has ended"):
        writer.submit(1, shard(store, 1))
    assert not [name for name in contents(store.path) if name.startswith(".")], "no lock, no temporaries"


@pytest.mark.parametrize("step", range(1, 9))
def test_refusals_of_the_file_system(tmp_path, monkeypatch, step):
    """Each flush of two shards fails once: data, folder, note, folder."""
    whole = create(tmp_path / "whole")
    fill(whole)
    store = create(tmp_path / "part")
    fsync, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            StoreError, match=r"shard_0000\d\.\w+ \([\d,]+ bytes needed, [\d,]+ free\).*finished shards are kept"
        ):
            fill(store)
    assert not [name for name in contents(store.path) if name.startswith(".")]
    assert all(same(store.read(number), shard(store, number)) for number in range(10) if number not in store.missing())
    fill(store)
    assert contents(store.path) == contents(whole.path)


def test_a_disk_too_small_is_noticed_before_writing(tmp_path, monkeypatch):
    store = create(tmp_path)

    class Usage:
        total, free = 1000, 100

    monkeypatch.setattr("grass_lib.store.shards.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(StoreError, match=r"shard_00000.safetensors \(5\d\d bytes needed, 100 free\)"):
        store.write(0, shard(store, 0))
    monkeypatch.setattr(Usage, "total", 0)
    store.write(0, shard(store, 0))


class Unknown:
    total = free = 0


@pytest.mark.system
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("precheck", [True, False])
def test_full_disk(tmp_path, monkeypatch, precheck):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk could be mounted: {done.stderr.strip()}")
    try:
        if not precheck:
            monkeypatch.setattr("grass_lib.store.shards.shutil.disk_usage", lambda path: Unknown)
        store = create(disk / "store", layers={"a": 1024, "b": 1024}, n_samples=200, shard_size=10)
        with pytest.raises(
            StoreError, match=r"store/shard_0000\d\.safetensors \(4\d,\d+ bytes needed.*the disk .*is full"
        ):
            fill(store)
        assert not [name for name in contents(store.path) if name.startswith(".")]
        finished = 20 - len(store.missing())
        assert finished >= 6
        assert all(problem.kind == "missing" for problem in store.verify(progress=False))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        again = create(store.path, layers={"a": 1024, "b": 1024}, n_samples=200, shard_size=10)
        assert len(fill(again)) == 20 - finished
        assert again.verify(progress=False) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_writers_of_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    store = create(tmp_path)
    script = (
        "import sys, time, store_tools\n"
        "with store_tools.create(sys.argv[1]).writer(worker=1, n_workers=3):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parent, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"ready\n"
        busy = r"another process writes to the gradient store .*\.lock-1of3 is locked"
        for worker, n_workers in ((1, 3), (0, 1), (1, 2)):
            with pytest.raises(StoreError, match=busy), store.writer(worker=worker, n_workers=n_workers):
                pytest.fail("two writers of one shard")
        with pytest.raises(StoreError, match=busy):
            store.write(1, shard(store, 1))
        assert fill(store, 0, 3) == [0, 3, 6, 9], "a worker with other shards is welcome"
    finally:
        child.kill()
        child.wait()
    assert fill(store) == [1, 2, 4, 5, 7, 8]
    assert not [name for name in contents(store.path) if name.startswith(".")]


def test_two_writers_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.1)
    store = create(tmp_path)
    with store.writer(), pytest.raises(StoreError, match="another process writes"), create(tmp_path).writer():
        pytest.fail("two writers of one shard")
    fill(store)


def test_shards_of_another_worker_are_refused(tmp_path):
    for store in (create(tmp_path), MemoryStore(layers={"a": 2}, n_samples=20, shard_size=2)):
        with store.writer(worker=1, n_workers=2) as writer:
            with pytest.raises(UsageError, match="shard 2 was given to worker 1 of 2; it is that of worker 0"):
                writer.submit(2, shard(store, 2))
            writer.submit(3, shard(store, 3))
        assert 3 not in store.missing()
        with pytest.raises(UsageError, match="worker 2 of 2"), store.writer(worker=2, n_workers=2):
            pass
        with pytest.raises(UsageError, match="max_pending=0"), store.writer(max_pending=0):
            pass


def test_left_overs_of_other_workers_stay(tmp_path):
    store = create(tmp_path)
    for number in (3, 4):
        (store.path / f".shard_{number:05d}.safetensors.tmp").write_text("half")
    (store.path / ".lock-create").write_text("")
    fill(store, 1, 2)
    assert [name for name in sorted(contents(store.path)) if name.startswith(".")] == [".shard_00004.safetensors.tmp"]
    fill(store)
    assert not [name for name in contents(store.path) if name.startswith(".")]


def test_shards_behind_a_failed_one_are_not_tried(tmp_path, monkeypatch):
    store = create(tmp_path)
    gate, tried = threading.Event(), []

    def failing(folder, manifest, number, tensors):
        tried.append(number)
        assert gate.wait(5)
        raise StoreError("no")

    monkeypatch.setattr(store_module, "write_shard", failing)

    def work():
        with store.writer(max_pending=3) as writer:
            for number in range(3):
                writer.submit(number, shard(store, number))
            gate.set()

    with pytest.raises(StoreError, match="no"):
        work()
    assert tried == [0]
