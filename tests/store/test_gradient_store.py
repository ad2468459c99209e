import gc
import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from store_tools import FINGERPRINT, LAYERS, N_SAMPLES, contents, create, fill, same, shard

from grass_lib.errors import UsageError
from grass_lib.rng import STREAM_VERSION
from grass_lib.store import GradientStore, MemoryStore, StoreError
from grass_lib.store.manifest import Manifest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, dtype):
    store = create(tmp_path / "store", dtype=dtype)
    assert store.n_shards == 10
    assert store.missing() == list(range(10))
    assert not store.is_complete
    fill(store)
    assert store.is_complete
    again = GradientStore.open(tmp_path / "store")
    assert (again.layers, again.n_samples, again.shard_size) == (LAYERS, N_SAMPLES, 8)
    assert list(again.layers) == list(LAYERS)
    assert (again.dtype, again.fingerprint, again.source) == (dtype, FINGERPRINT, {"experiment": "toy"})
    assert again.stored_bytes == sum(map(len, contents(again.path).values()))
    for number in range(10):
        assert same(again.read(number), shard(store, number))
        assert same(load_file(again.path / f"shard_{number:05d}.safetensors"), shard(store, number)), "other readers"
    assert list(again.shard_rows(9)) == [72, 73, 74]
    items = [(rows, name, tensor.clone()) for rows, name, tensor in again.stream()]
    assert [name for _, name, _ in items] == list(LAYERS) * 10
    for position, (rows, name, tensor) in enumerate(items):
        assert rows == again.shard_rows(position // 3)
        assert torch.equal(tensor, shard(store, position // 3)[name])
        assert tensor.dtype == dtype
    assert again.verify(progress=False) == []


def test_files_are_in_layer_order_and_without_left_overs(tmp_path):
    store = create(tmp_path / "store")
    fill(store)
    names = {f"shard_{number:05d}.{kind}" for number in range(10) for kind in ("json", "safetensors")}
    assert set(contents(store.path)) == names | {"manifest.json"}
    with safe_open(store.path / "shard_00003.safetensors", "pt") as file:
        assert list(file.offset_keys()) == list(LAYERS)
    note = json.loads((store.path / "shard_00003.json").read_text())
    assert set(note) == {"bytes", "fingerprint", "first", "rows", "sha256"}
    assert (note["first"], note["rows"]) == (24, 8)


def test_parts_of_a_store(tmp_path):
    store = create(tmp_path / "store")
    fill(store)
    assert list(store.read(2, ["head", "h.10.mlp"])) == ["h.10.mlp", "head"]
    found = [(rows.start, name, tensor.clone()) for rows, name, tensor in store.stream(shards=[7, 2], layers=["head"])]
    assert [(start, name) for start, name, _ in found] == [(16, "head"), (56, "head")]
    assert torch.equal(found[1][2], shard(store, 7)["head"])
    assert list(store.stream(layers=[])) == list(store.stream(shards=[])) == []


@pytest.mark.parametrize("prefetch", [1, 2, 4, 50])
def test_streamed_tensors_stay_valid_for_prefetch_further_items(tmp_path, prefetch):
    store = create(tmp_path / "store")
    fill(store)
    kept = []
    for rows, name, tensor in store.stream(prefetch=prefetch):
        kept = [*kept, (rows.start // 8, name, tensor)][-prefetch:]
        for number, layer, old in kept:
            assert torch.equal(old, shard(store, number)[layer])


def test_stream_reuses_its_buffers(tmp_path):
    store = create(tmp_path / "store")
    fill(store)
    places = [tensor.data_ptr() for _, _, tensor in store.stream(prefetch=2)]
    assert len(places) == 30
    assert len(set(places)) <= 4


def readers():
    return [thread for thread in threading.enumerate() if thread.name in ("shard-reader", "shard-writer")]


def test_stream_thread_ends_when_the_consumer_does(tmp_path):
    store = create(tmp_path / "store")
    fill(store)
    for _ in store.stream(prefetch=1):
        assert readers()
        break
    gc.collect()
    assert not readers()

    def consume():
        for _ in store.stream():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    gc.collect()
    assert not readers()
    list(store.stream())
    assert not readers()


def test_errors_while_streaming_reach_the_consumer(tmp_path):
    store = create(tmp_path / "store")
    fill(store)
    stream = store.stream(prefetch=1)
    next(stream)
    path = store.path / "shard_00005.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"shard_00005.* is damaged: it has \d+ bytes, expected \d+"):
        list(stream)
    assert not readers()


def test_incomplete_stores_name_what_is_missing(tmp_path):
    store = create(tmp_path / "store")
    for number in (0, 4, 5):
        store.write(number, shard(store, number))
    assert store.missing() == [1, 2, 3, 6, 7, 8, 9]
    assert store.missing(1, 3) == [1, 7]
    with pytest.raises(StoreError, match=r"7 of 10 shards are missing in .*: 1-3, 6-9; cache again"):
        store.stream()
    assert [rows.start for rows, _, _ in store.stream(shards=[0, 4], layers=["head"])] == [0, 32]
    with pytest.raises(StoreError, match="shard 3 is missing"):
        store.read(3)
    assert [(problem.number, problem.kind) for problem in store.verify(progress=False)] == [
        (number, "missing") for number in (1, 2, 3, 6, 7, 8, 9)
    ]


def test_another_fingerprint_is_refused_with_both_values(tmp_path):
    store = create(tmp_path / "store", provenance={"torch": "1"})
    before = contents(store.path)
    assert create(store.path, source={"other": 1}, provenance=None).provenance == {"torch": "1"}, "not its identity"
    other = {**FINGERPRINT, "seed": 4, "data": {"sha256": "d1", "rows": 75}}
    with pytest.raises(StoreError) as refused:
        create(store.path, fingerprint=other, n_samples=80, layers={**LAYERS, "head": 4, "extra": 1})
    for part in (
        "seed is 3 there, 4 here",
        "data.sha256 is d0 there, d1 here",
        "n_samples is 75 there, 80 here",
        "layers.head is 3 there, 4 here",
        "layers.extra is (absent) there, 1 here",
    ):
        assert part in str(refused.value)
    assert "rows" not in str(refused.value)
    with pytest.raises(StoreError, match="dtype is bfloat16 there, float32 here"):
        create(store.path, dtype=torch.float32)
    with pytest.raises(StoreError, match="the layers are in another order"):
        create(store.path, layers=dict(reversed(LAYERS.items())))
    assert contents(store.path) == before


def test_random_streams_of_another_version_are_refused(tmp_path, monkeypatch):
    create(tmp_path)
    there = STREAM_VERSION
    plan = Manifest.plan
    monkeypatch.setattr(Manifest, "plan", lambda **arguments: replace(plan(**arguments), stream_version=there + 1))
    with pytest.raises(StoreError, match=f"stream_version is {there} there, {there + 1} here"):
        create(tmp_path)


def test_resume_writes_only_what_is_missing(tmp_path):
    whole = create(tmp_path / "whole")
    fill(whole)
    part = create(tmp_path / "part")
    for number in (0, 1, 2, 6):
        part.write(number, shard(part, number))
    times = {path: path.stat().st_mtime_ns for path in part.path.iterdir()}
    assert fill(create(part.path)) == [3, 4, 5, 7, 8, 9]
    assert contents(part.path) == contents(whole.path)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_manifest_that_was_changed(tmp_path):
    store = create(tmp_path)
    path = store.path / "manifest.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(StoreError, match=r"manifest\.json (is damaged|is of format)"):
            GradientStore.open(store.path)
    path.write_bytes(whole.replace(b'"format": 1', b'"format": 2'))
    with pytest.raises(StoreError, match="is of format 2, this version reads format 1"):
        GradientStore.open(store.path)


def test_places_without_a_store(tmp_path):
    with pytest.raises(StoreError, match=r"there is no gradient store in .*manifest\.json"):
        GradientStore.open(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file', which is a file; expected the path of a folder"):
        create(tmp_path / "file")


@pytest.mark.parametrize("kind", [GradientStore, MemoryStore])
def test_wrong_rows_are_refused_with_both_values(tmp_path, kind):
    plan = {"layers": LAYERS, "n_samples": 75, "shard_size": 8, "dtype": torch.float16, "fingerprint": {}}
    store = kind.create(tmp_path, **plan) if kind is GradientStore else kind(**plan)
    rows = shard(store, 1)
    for message, wrong in {
        r"layer head: rows of shape \(7, 3\), expected \(8, 3\)": {**rows, "head": rows["head"][:7]},
        r"layer head: torch.float32 on cpu, expected torch.float16 on cpu": {**rows, "head": rows["head"].float()},
        r"layer head: torch.float16 on meta, expected torch.float16 on cpu": {**rows, "head": rows["head"].to("meta")},
        r"1 layers \(head\) missing and none not in": {name: rows[name] for name in list(rows)[:2]},
        r"none missing and 1 layers \(tail\) not in": {**rows, "tail": rows["head"]},
    }.items():
        with pytest.raises(UsageError, match=message):
            store.write(1, wrong)
        with store.writer() as writer, pytest.raises(UsageError, match=message):
            writer.submit(1, wrong)
    with pytest.raises(UsageError, match="shard 10 of a gradient store with shards 0 to 9"):
        store.write(10, rows)
    with pytest.raises(UsageError, match="shard 10 of"):
        store.read(10)
    store.write(1, rows)
    with pytest.raises(UsageError, match=r"no layer tail in the gradient store; it has h\.10\.mlp, h\.2\.attn, head"):
        store.read(1, ["tail"])
    with pytest.raises(UsageError, match="layers='head'; expected a list"):
        store.read(1, "head")
    with pytest.raises(UsageError, match="prefetch=0"):
        store.stream(prefetch=0)
    with pytest.raises(UsageError, match="worker 3 of 3"):
        store.missing(3, 3)


def test_wrong_plans_are_refused(tmp_path):
    for message, wrong in {
        "without layers": {"layers": {}},
        "layer name '__metadata__' cannot": {"layers": {"__metadata__": 3}},
        "features of layer a of a gradient store is 0; expected a positive": {"layers": {"a": 0}},
        "n_samples of a gradient store is 0": {"n_samples": 0},
        "shard_size of a gradient store is 2.5": {"shard_size": 2.5},
        "dtype is torch.int16, .*expected one of float32, bfloat16, float16, int8, fp8": {"dtype": torch.int16},
        "fingerprint of a gradient store: .*expected JSON": {"fingerprint": {"a": torch.ones(1)}},
        "source of a gradient store: .*expected JSON": {"source": {"a": float("nan")}},
    }.items():
        with pytest.raises(UsageError, match=message):
            create(tmp_path / "store", **wrong)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_views(tmp_path):
    """Transposed and offset rows are written as they read, and gradients are no obstacle."""
    store = create(tmp_path, layers={"a": 4}, n_samples=6, shard_size=8, dtype=torch.float32)
    rows = torch.arange(48.0).reshape(8, 6).T[:, 2:6].requires_grad_()
    store.write(0, {"a": rows})
    assert torch.equal(store.read(0)["a"], rows.detach())


def test_special_values_keep_their_bits(tmp_path):
    bits = torch.randint(-(2**15), 2**15, (8, 12), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    store = create(tmp_path, layers={"a": 12}, n_samples=8)
    store.write(0, {"a": bits.view(torch.bfloat16)})
    assert torch.equal(store.read(0)["a"].view(torch.int16), bits)


def test_memory_store_is_like_the_one_on_the_disk(tmp_path):
    disk = create(tmp_path)
    memory = MemoryStore(layers=LAYERS, n_samples=75, shard_size=8, dtype=torch.bfloat16, fingerprint=FINGERPRINT)
    assert fill(memory, 1, 3) == fill(disk, 1, 3) == [1, 4, 7]
    assert memory.missing() == disk.missing()
    with pytest.raises(StoreError, match="missing in the gradient store in memory: 0, 2-3, 5-6, 8-9"):
        memory.stream()
    rows = shard(memory, 0)
    memory.write(0, rows)
    rows["head"].zero_()
    assert same(memory.read(0), shard(memory, 0)), "its own copy"
    for store in (memory, disk):
        fill(store)
    for (rows, name, tensor), (other_rows, other_name, other) in zip(memory.stream(), disk.stream(), strict=True):
        assert (rows, name) == (other_rows, other_name)
        assert torch.equal(tensor, other)
    assert list(memory.read(3, ["head"])) == ["head"]
    assert memory.stored_bytes == 75 * 20 * 2
    assert memory.is_complete
    memory.drop(4)
    assert memory.missing() == [4]
