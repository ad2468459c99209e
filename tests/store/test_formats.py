"""int8 and fp8 rows: codes against float64, round trip, special values, and the store's whole contract."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_tools import FINGERPRINT, LAYERS, N_SAMPLES, SHARD_SIZE, contents, create, fill, same, shard

from grass_lib.errors import StoreError, UsageError
from grass_lib.store import GradientStore, MemoryStore
from grass_lib.store.formats import (
    DTYPES,
    SCALE_BLOCK,
    SCALED,
    Rows,
    encode,
    parse_dtype,
    row_bytes,
    scale_count,
)

CODED = ["int8", "fp8"]
TOOLS = Path(__file__).with_name("store_tools.py")


def values(n=40, k=300, seed=0):
    """Rows whose blocks differ by many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-30, 30, (n, scale_count(k)), generator=generator).double()
    wide = sizes.repeat_interleave(SCALE_BLOCK, dim=1)[:, :k]
    return (torch.randn(n, k, generator=generator, dtype=torch.float64) * wide).float()


def tops(rows):
    """Largest magnitude of each value's block, by a loop."""
    result = torch.empty_like(rows, dtype=torch.float64)
    for start in range(0, rows.shape[1], SCALE_BLOCK):
        block = rows[:, start : start + SCALE_BLOCK].double().abs()
        result[:, start : start + SCALE_BLOCK] = block.amax(dim=1, keepdim=True)
    return result


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("k", [1, 5, 127, 128, 129, 300, 512])
def test_round_trip_bounds(name, k):
    rows = values(k=k)
    coded = encode(rows, DTYPES[name])
    assert coded.codes.dtype == DTYPES[name]
    assert coded.codes.shape == rows.shape
    assert coded.scales.shape == (40, -(-k // 128))
    error, top = (coded.decoded().double() - rows.double()).abs(), tops(rows)
    scale = coded.scales.double().repeat_interleave(SCALE_BLOCK, dim=1)[:, :k]
    # The scale is the smallest bfloat16 with which the largest value has a code.
    largest = SCALED[DTYPES[name]]
    assert (scale * largest >= top * (1 - 1e-6)).all()
    assert (scale * largest <= top * (1 + 2.0**-7)).all()
    if name == "int8":
        assert (error <= scale / 2 * (1 + 1e-5)).all()
        assert (error <= top / 252).all()
    else:
        # 3 bits after the leading one: half a step is 1/16 at most; below the smallest normal code half of 2^-9.
        assert (error <= (rows.double().abs() / 16).maximum(scale * 2.0**-10) * (1 + 1e-5)).all()
        assert (error <= top / 27).all()
    assert error.max() > 0 or k == 1


@pytest.mark.parametrize("name", CODED)
def test_codes_are_those_of_exact_arithmetic(name):
    """Against float64: the nearest code of value / scale."""
    rows = values(n=20, k=200, seed=1)
    coded = encode(rows, DTYPES[name])
    scale = coded.scales.double().repeat_interleave(SCALE_BLOCK, dim=1)[:, :200]
    exact = rows.double() / scale
    if name == "int8":
        candidates = torch.arange(-127, 128).double()
    else:
        candidates = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        candidates = candidates[candidates.isfinite()].unique()
    distance = (exact[..., None] - candidates).abs().amin(dim=-1)
    assert ((coded.codes.double() - exact).abs() <= distance + 1e-5).all()
    decoded = (coded.codes.double() * scale).float()
    assert torch.equal(coded.decoded(), decoded)


def test_every_fp8_code_is_decoded():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes.float().isfinite()
    rows = Rows(codes[finite][None], torch.ones(1, scale_count(int(finite.sum())), dtype=torch.bfloat16))
    assert torch.equal(rows.decoded(), codes[finite].float()[None])


@pytest.mark.parametrize("name", CODED)
def test_special_values(name):
    rows = torch.zeros(8, 300)
    rows[0, 3], rows[1, 130], rows[2, 299] = torch.nan, torch.inf, -torch.inf
    rows[:3] += 1.0
    rows[3, 7], rows[4, 7], rows[5] = 1e-40, 1e-37, 3.4e38
    rows[6, 9], rows[7, 9] = -0.0, -5.0
    found = encode(rows, DTYPES[name]).decoded()
    for row, block in ((0, 0), (1, 1), (2, 2)):
        bad = torch.zeros(300, dtype=torch.bool)
        bad[128 * block : 128 * (block + 1)] = True
        assert found[row, bad].isnan().all(), "the whole block, so that it is never taken for a number"
        assert ((found[row, ~bad] - 1).abs() < 0.01).all(), "and no other block"
    assert not found[3].any()
    assert not found[4].any(), "too small for a normal scale"
    assert found[5].isfinite().all()
    assert ((found[5] - 3.4e38).abs() < 3.4e38 / 64).all()
    assert not found[6].any()
    assert found[7].count_nonzero() == 1
    assert abs(float(found[7, 9]) + 5) < 0.04
    assert encode(torch.zeros(0, 5), DTYPES[name]).decoded().shape == (0, 5)


def test_names_and_sizes():
    assert [parse_dtype(name) for name in DTYPES] == [parse_dtype(dtype) for dtype in DTYPES.values()]
    for wrong in ("int4", torch.float64, None):
        with pytest.raises(
            UsageError, match=rf"dtype is {wrong}.*expected one of float32, bfloat16, float16, int8, fp8"
        ):
            parse_dtype(wrong)
    found = {name: row_bytes(4096, dtype) for name, dtype in DTYPES.items()}
    assert found == {"float32": 16384, "bfloat16": 8192, "float16": 8192, "int8": 4160, "fp8": 4160}
    assert row_bytes(5, torch.int8) == 7


@pytest.mark.parametrize("name", CODED)
def test_store_of_codes(tmp_path, name):
    layers = {"wide.attn": 301, **LAYERS}
    store = create(tmp_path / "store", dtype=name, layers=layers)
    assert fill(store) == list(range(10))
    again = GradientStore.open(tmp_path / "store")
    assert (again.dtype, again.row_dtype) == (DTYPES[name], torch.float32)
    assert again.verify(progress=False) == []
    assert again.stored_bytes == sum(map(len, contents(again.path).values()))
    for number in range(10):
        wanted = {key: encode(rows, DTYPES[name]) for key, rows in shard(store, number).items()}
        assert same(again.read(number), {key: rows.decoded() for key, rows in wanted.items()})
        plain = load_file(again.path / f"shard_{number:05d}.safetensors")
        assert set(plain) == {*layers, *(f"{key}::scale" for key in layers)}
        for key, rows in wanted.items():
            assert torch.equal(plain[key].view(torch.int8), rows.codes.view(torch.int8)), "other readers"
            assert torch.equal(plain[f"{key}::scale"], rows.scales)
    assert list(again.read(2, ["head"])) == ["head"]
    items = [(samples, key, rows.clone()) for samples, key, rows in again.stream(prefetch=1)]
    assert [key for _, key, _ in items] == list(layers) * 10
    for position, (samples, key, rows) in enumerate(items):
        assert samples == again.shard_rows(position // 4)
        assert torch.equal(rows, again.read(position // 4)[key])
    for _, key, rows in again.stream_rows(shards=[9], layers=["wide.attn"]):
        assert torch.equal(rows.decoded(), again.read(9)[key])
        assert rows.nbytes == 3 * row_bytes(301, DTYPES[name])


@pytest.mark.parametrize("name", CODED)
def test_rows_given_as_codes_are_those_given_as_numbers(tmp_path, name):
    left, right = (create(tmp_path / side, dtype=name) for side in ("left", "right"))
    fill(left)
    for number in range(10):
        right.write(number, {key: encode(rows, DTYPES[name]) for key, rows in shard(right, number).items()})
    assert contents(left.path) == contents(right.path)


@pytest.mark.parametrize("name", CODED)
def test_memory_store_of_codes(tmp_path, name):
    disk = create(tmp_path, dtype=name)
    memory = MemoryStore(layers=LAYERS, n_samples=N_SAMPLES, shard_size=SHARD_SIZE, dtype=name, fingerprint=FINGERPRINT)
    assert memory.manifest.digest == disk.manifest.digest
    assert fill(memory) == fill(disk)
    for (one, key, rows), (other, other_key, others) in zip(memory.stream(), disk.stream(), strict=True):
        assert (one, key) == (other, other_key)
        assert torch.equal(rows, others)
    assert memory.stored_bytes == N_SAMPLES * (20 + 3 * 2)
    assert same(memory.read(3), disk.read(3))


@pytest.mark.parametrize("name", CODED)
def test_wrong_codes_are_refused(tmp_path, name):
    store = create(tmp_path, dtype=name)
    rows = shard(store, 1)
    coded = {key: encode(value, DTYPES[name]) for key, value in rows.items()}
    head = coded["head"]
    for message, wrong in {
        "layer head: torch.bfloat16 on cpu, expected torch.float32": {**rows, "head": rows["head"].bfloat16()},
        "layer head: no scales, expected": {**rows, "head": Rows(head.codes)},
        r"layer head: scales of shape \(7, 1\), expected \(8, 1\)": {**rows, "head": Rows(head.codes, head.scales[:7])},
        r"layer head: rows of shape \(7, 3\)": {**rows, "head": Rows(head.codes[:7], head.scales)},
        "layer head: torch.float32 on cpu, expected": {**rows, "head": Rows(rows["head"], head.scales)},
    }.items():
        with pytest.raises(UsageError, match=message):
            store.write(1, wrong)
    with pytest.raises(UsageError, match="layer name 'a::scale' cannot be used"):
        create(tmp_path / "other", layers={"a::scale": 3})


@pytest.mark.parametrize("name", CODED)
def test_workers_damage_and_merge(tmp_path, name):
    whole = create(tmp_path / "whole", dtype=name)
    fill(whole)
    parts = [create(tmp_path / f"part{worker}", dtype=name) for worker in range(3)]
    for worker, part in enumerate(parts):
        fill(part, worker, 3)
    merged = GradientStore.merge(parts, tmp_path / "merged")
    assert contents(merged.path) == contents(whole.path)
    path = merged.path / "shard_00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # parts share it
    path.write_bytes(content)
    assert [(problem.number, problem.kind) for problem in merged.verify(progress=False)] == [(4, "damaged")]
    merged.drop(4)
    assert fill(merged) == [4]
    assert contents(merged.path) == contents(whole.path)


def test_another_dtype_is_refused_with_both_values(tmp_path):
    create(tmp_path, dtype="int8")
    with pytest.raises(StoreError, match="dtype is int8 there, fp8 here"):
        create(tmp_path, dtype="fp8")
    with pytest.raises(StoreError, match="dtype is int8 there, bfloat16 here"):
        create(tmp_path)


def test_older_stores_keep_their_fingerprint(tmp_path):
    """The identity of plain rows has no entries that came with the codes."""
    text = (create(tmp_path).path / "manifest.json").read_text()
    assert "scale_block" not in text
    assert "low_rank" not in text


@pytest.mark.system
@pytest.mark.parametrize("name", CODED)
def test_killed_writers_of_codes_go_on(tmp_path, name):
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, TOOLS, whole, "none=0", name], check=True)
    kills, generator = 0, random.Random(0)
    folder = tmp_path / "killed"
    for kind in ("write", "fsync", "before-rename", "after-rename") * 2:
        done = subprocess.run([sys.executable, TOOLS, folder, f"{kind}={generator.randint(1, 20)}", name], check=False)
        kills += done.returncode == -signal.SIGKILL
    subprocess.run([sys.executable, TOOLS, folder, "none=0", name], check=True)
    assert kills >= 4
    assert contents(folder) == contents(whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CODED)
def test_a_gpu_has_the_same_bits(name):
    rows = values(n=200, k=1000, seed=3)
    rows[0, 0], rows[1, 999], rows[2] = torch.nan, torch.inf, 3.4e38
    here, there = encode(rows, DTYPES[name]), encode(rows.cuda(), DTYPES[name])
    assert torch.equal(there.codes.cpu().view(torch.int8), here.codes.view(torch.int8))
    assert torch.equal(there.scales.cpu().view(torch.int16), here.scales.view(torch.int16))
    # Products with numbers that are none differ in bits that mean nothing.
    torch.testing.assert_close(there.decoded().cpu(), here.decoded(), rtol=0, atol=0, equal_nan=True)
