"""Smaller rows: scores against explicit formulas in float64, order of scores, kills, workers, damage and refusals."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo

from grass_lib.attribution import InfluenceFunction, compress
from grass_lib.bench.store_compare import compare, sample_bytes
from grass_lib.errors import GrassError, StoreError, UsageError
from grass_lib.store import GradientStore
from grass_lib.store.formats import row_bytes

PROGRAM = Path(__file__).with_name("compress_program.py")


def loss(model, batch):
    x, y = batch
    return torch.nn.functional.cross_entropy(model(x), y, reduction="none")


def task(n, n_query=5, seed=0):
    """A model of 35 and 18 features in two layers, its training batches and queries."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x, y = torch.randn(n + n_query, 6), torch.randint(0, 3, (n + n_query,))
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, n, 4)]
    return model, [tuple(part[: n - 4 * i] for part in b) for i, b in enumerate(batches)], [(x[n:], y[n:])]


def influence(model, store, dtype="float32", **options):
    return InfluenceFunction(model, loss, store=store, dtype=dtype, shard_size=8, progress=False, **options)


def cached(folder, n=60, dtype="float32", seed=0):
    model, train, query = task(n, seed=seed)
    found = influence(model, folder, dtype)
    found.cache(train)
    return model, train, query, found


def all_rows(store):
    shards = [store.read(number) for number in range(store.n_shards)]
    return {name: torch.cat([shard[name] for shard in shards]).double() for name in store.layers}


def query_rows(model, query, folder):
    """Gradients of queries, as the training rows of another store: minus the target's, hence the loss's."""
    found = influence(model, folder)
    found.cache(query)
    return all_rows(found.store)


def explicit(train, query, damping, means):
    """Sums over layers of ``g . (F + damping * mean * I)^-1 . h`` in float64."""
    total = 0.0
    for name, g in train.items():
        matrix = g.mT @ g / len(g) + damping * means[name] * torch.eye(g.shape[1], dtype=torch.float64)
        total = total + g @ torch.linalg.solve(matrix, query[name].mT)
    return total


@pytest.mark.parametrize("n", [9, 60])  # fewer samples than features, and more
@pytest.mark.parametrize("rank", [1, 4, 12, 100])
def test_low_rank_scores_equal_the_explicit_formula(tmp_path, n, rank):
    model, _, query, whole = cached(tmp_path / "whole", n)
    small = compress(tmp_path / "whole", tmp_path / "small", rank=rank, progress=False)
    rows = all_rows(whole.store)
    means = {name: float(g.square().sum()) / len(g) / g.shape[1] for name, g in rows.items()}
    cut = {}
    for name, g in rows.items():
        _, values, right = torch.linalg.svd(g, full_matrices=False)
        kept = right[:rank]
        cut[name] = g @ kept.mT @ kept
        share = float(values[:rank].square().sum() / values.square().sum())
        assert small.basis.kept[name] == pytest.approx(share, abs=1e-6)
        assert small.basis.means[name] == pytest.approx(means[name], rel=1e-6)
        coefficients = all_rows(small)[name]
        assert coefficients.shape[1] == small.layers[name] <= rank
        again = small.basis.expand(name, coefficients)
        assert (again - cut[name]).abs().max() < 1e-5 * g.abs().max(), "the closest rows of this rank"
    wanted = explicit(cut, query_rows(model, query, tmp_path / "queries"), 0.1, means)
    found = influence(model, tmp_path / "small")
    got = found.attribute(query, 0.1).double()
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()
    own = explicit(cut, cut, 0.1, means).diagonal()
    assert (found.self_influence(0.1).double() - own).abs().max() < 1e-4 * own.max()
    best = found.topk(query, 3, 0.1)
    assert torch.equal(best.indices[:, 0], got.mT.argsort(dim=1, descending=True, stable=True)[:, :3])
    if rank == 100:
        old = whole.attribute(query, 0.1)
        assert (got - old).abs().max() < 1e-4 * old.abs().max(), "nothing is lost where all directions are kept"
    elif rank == 1:
        assert (got - whole.attribute(query, 0.1)).abs().max() > 1e-2 * got.abs().max()


def test_identity_hessian_asks_in_coefficients(tmp_path):
    model, _, query, whole = cached(tmp_path / "whole")
    compress(tmp_path / "whole", tmp_path / "small", rank=100, progress=False)
    found = influence(model, tmp_path / "small", hessian="Identity")
    wanted = influence(model, tmp_path / "whole", hessian="Identity").attribute(query)
    assert (found.attribute(query) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert whole.store.basis is None


@pytest.mark.parametrize("dtype", ["int8", "fp8", "bfloat16"])
def test_compressing_gives_the_rows_that_caching_gives(tmp_path, dtype):
    model, train, query, _ = cached(tmp_path / "whole")
    small = compress(tmp_path / "whole", tmp_path / "small", dtype=dtype, progress=False)
    direct = influence(model, tmp_path / "direct", dtype)
    direct.cache(train)
    for number in range(small.n_shards):
        name = f"shard_{number:05d}.safetensors"
        assert (small.path / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()
    scores = influence(model, tmp_path / "small").attribute(query, 0.1)
    assert torch.equal(scores, influence(model, tmp_path / "direct", dtype).attribute(query, 0.1))
    assert torch.equal(scores, direct.attribute(query, 0.1)), "the curvature of caching has the bits of reading back"


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_scores_of_codes_equal_the_explicit_formula_on_what_is_stored(tmp_path, dtype):
    model, _, query, found = cached(tmp_path / "store", dtype=dtype)
    rows = all_rows(found.store)
    means = {name: float(g.square().sum()) / len(g) / g.shape[1] for name, g in rows.items()}
    wanted = explicit(rows, query_rows(model, query, tmp_path / "queries"), 0.1, means)
    assert (found.attribute(query, 0.1).double() - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_an_interrupted_cache_of_codes_goes_on_bit_identical(tmp_path, dtype):
    model, train, query, whole = cached(tmp_path / "whole", dtype=dtype)
    for worker in (1, 0):
        influence(model, tmp_path / "parts", dtype).cache(train, worker=worker, n_workers=2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    memory = influence(model, None, dtype)
    memory.cache(train)
    assert torch.equal(memory.attribute(query), whole.attribute(query))


@pytest.mark.parametrize(("changes", "least"), [({"dtype": "bfloat16"}, 0.999), ({"dtype": "int8"}, 0.999)])
def test_order_of_scores_is_kept(tmp_path, changes, least):
    _, _, _, whole = cached(tmp_path / "whole", n=200)
    small = compress(tmp_path / "whole", tmp_path / "small", progress=False, **changes)
    found = compare(whole.store, small, queries=20)
    assert min(found.self_influence, found.scores) > least
    assert found.lowest > 0.99


def test_comparison_has_a_scale(tmp_path):
    """Fewer directions keep less; the rank correlation is that of ranks counted one by one."""
    model, _, _, whole = cached(tmp_path / "whole", n=200)
    found = {}
    for rank in (1, 6, 100):
        small = compress(tmp_path / "whole", tmp_path / f"{rank}", dtype="bfloat16", rank=rank, progress=False)
        found[rank] = compare(whole.store, small, queries=20)
        assert found[rank].bytes_per_sample == sum(2 * k for k in small.layers.values())
        assert found[rank].shared_bytes == (small.path / "basis.safetensors").stat().st_size
    assert found[1].scores < found[6].scores < found[100].scores
    assert found[1].kept < found[6].kept < found[100].kept == pytest.approx(1.0)
    assert found[100].scores > 0.999
    assert found[1].scores < 0.97
    small = influence(model, tmp_path / "6").self_influence(0.1)
    exact = whole.self_influence(0.1)
    ranks = [[int((values < value).sum()) for value in values] for values in (small, exact)]
    wanted = torch.corrcoef(torch.tensor(ranks, dtype=torch.float64))[0, 1]
    assert found[6].self_influence == pytest.approx(float(wanted), abs=1e-4)
    same = compare(whole.store, whole.store, queries=3)
    assert (same.scores, same.self_influence, same.ratio) == (pytest.approx(1.0), pytest.approx(1.0), 1.0)


def test_bytes_of_a_sample(tmp_path):
    _, _, _, whole = cached(tmp_path / "whole")
    small = compress(tmp_path / "whole", tmp_path / "small", dtype="int8", rank=5, progress=False)
    assert sample_bytes(whole.store) == 4 * (35 + 18)
    assert sample_bytes(small) == 2 * row_bytes(5, small.dtype) == 14


def test_layers_without_gradients_and_special_rows(tmp_path):
    store = GradientStore.create(
        tmp_path / "whole", layers={"b": 4, "a": 6}, n_samples=10, shard_size=4, fingerprint={"model": "m"}
    )
    for number in range(3):
        rows = len(store.shard_rows(number))
        a = torch.zeros(rows, 6)
        a[:, number] = 1.0
        store.write(number, {"b": torch.zeros(rows, 4), "a": a})
    small = compress(store, tmp_path / "small", rank=2, progress=False)
    assert list(small.layers.items()) == [("b", 1), ("a", 2)]
    assert not any(small.read(number)["b"].any() for number in range(3))
    assert small.basis.kept["b"] == 1.0
    assert small.basis.kept["a"] == pytest.approx(0.8)
    store.write(1, {"b": torch.zeros(4, 4), "a": torch.full((4, 6), torch.nan)})
    codes = compress(store, tmp_path / "codes", dtype="int8", progress=False)
    assert codes.read(1)["a"].isnan().all(), "what was not a number does not become one"
    with pytest.raises(GrassError, match="layer a"):
        compress(store, tmp_path / "bad", rank=2, progress=False)


def test_workers_share_a_folder_or_are_merged(tmp_path):
    cached(tmp_path / "whole")
    one = compress(tmp_path / "whole", tmp_path / "one", dtype="int8", rank=4, progress=False)
    for worker in (2, 0, 1):
        options = {"dtype": "int8", "rank": 4, "progress": False, "worker": worker, "n_workers": 3}
        compress(tmp_path / "whole", tmp_path / "shared", **options)
        compress(tmp_path / "whole", tmp_path / f"part{worker}", **options)
    assert contents(tmp_path / "shared") == contents(one.path)
    GradientStore.merge([tmp_path / f"part{worker}" for worker in range(3)], tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(one.path)
    assert GradientStore.open(tmp_path / "merged").verify(progress=False) == []


def test_a_damaged_or_lost_basis_is_found(tmp_path):
    model, _, query, _ = cached(tmp_path / "whole")
    small = compress(tmp_path / "whole", tmp_path / "small", rank=4, progress=False)
    path = small.path / "basis.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        StoreError, match=r"basis\.safetensors is damaged: its SHA-256 is .*compress the store's parent"
    ):
        small.verify(progress=False)
    with pytest.raises(StoreError, match="is damaged"):
        influence(model, small.path).attribute(query)
    with pytest.raises(StoreError, match="is damaged"):
        compress(tmp_path / "whole", small.path, rank=4, progress=False)
    path.unlink()
    with pytest.raises(StoreError, match="could not be read"):
        GradientStore.open(small.path).verify(progress=False)


def test_refusals(tmp_path):
    model, train, query, whole = cached(tmp_path / "whole")
    small = compress(tmp_path / "whole", tmp_path / "small", dtype="int8", progress=False)
    for message, options in {
        "rank is 0": {"rank": 0},
        "has float32 rows already": {},
        "has float32 rows already; expected another": {"dtype": "float32"},
        "dtype is int4": {"dtype": "int4"},
        "worker 2 of 2": {"dtype": "int8", "worker": 2, "n_workers": 2},
    }.items():
        with pytest.raises(UsageError, match=message):
            compress(tmp_path / "whole", tmp_path / "new", progress=False, **options)
    with pytest.raises(UsageError, match="was itself compressed from another store"):
        compress(small, tmp_path / "new", dtype="fp8", progress=False)
    with pytest.raises(UsageError, match="is the store to compress"):
        compress(tmp_path / "whole", tmp_path / "whole", dtype="fp8", progress=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(StoreError, match="dtype is int8 there, fp8 here"):
        compress(tmp_path / "whole", small.path, dtype="fp8", progress=False)
    with pytest.raises(StoreError, match="low_rank"):
        compress(tmp_path / "whole", small.path, dtype="int8", rank=3, progress=False)
    small.drop(3)
    with pytest.raises(UsageError, match="was compressed from another store, and 1 of 8 shards are missing"):
        influence(model, small.path).cache(train)
    whole.store.drop(3)
    with pytest.raises(StoreError, match=r"1 of 8 shards are missing in .*: 3; compress a finished store"):
        compress(tmp_path / "whole", tmp_path / "new", dtype="int8", progress=False)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(StoreError, match=r"model is .* there, .* here"):
        influence(model, small.path).attribute(query)
    cached(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="not of the same gradients: model"):
        compare(GradientStore.open(tmp_path / "other"), small, queries=3)


def test_a_killed_compression_goes_on(tmp_path):
    """Killed at many steps, of the basis, the manifest and the shards; ends with the bits of one that was not."""
    cached(tmp_path / "whole", n=100)
    one = compress(tmp_path / "whole", tmp_path / "one", dtype="int8", rank=4, progress=False)
    kills, generator = 0, random.Random(0)
    for kind, step in [("rename", 1), ("fsync", 1), ("fsync", 2), ("rename", 2), ("fsync", 9)] + [
        (kind, generator.randint(3, 20)) for kind in ("rename", "fsync")
    ]:
        words = [sys.executable, str(PROGRAM), str(tmp_path / "whole"), str(tmp_path / "killed"), kind, str(step)]
        done = subprocess.run(words, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        kills += done.returncode == -signal.SIGKILL
        if (tmp_path / "killed" / "manifest.json").exists():
            there = GradientStore.open(tmp_path / "killed")
            assert all(problem.kind == "missing" for problem in there.verify(progress=False))
    assert kills >= 5
    compress(tmp_path / "whole", tmp_path / "killed", dtype="int8", rank=4, progress=False)
    assert contents(tmp_path / "killed") == contents(one.path)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_small_language_model_keeps_its_order(tmp_path):
    """Codes on gradients of a text model, asked with real queries: the same best samples."""
    model, (ids,) = zoo.make_model("text"), zoo.make_samples("text", 60)

    def text_loss(model, batch):
        (ids,) = batch
        following = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        losses = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), following.flatten(), reduction="none")
        return losses.view(ids.shape).sum(dim=1)

    train, scores = [(part,) for part in ids[:48].split(8)], {}
    for dtype in ("float32", "int8", "fp8"):
        found = InfluenceFunction(model, text_loss, store=None, dtype=dtype, shard_size=16, progress=False)
        found.cache(train)
        scores[dtype] = found.attribute([(ids[48:],)], 0.1)
    ranks = {dtype: each.argsort(dim=0).argsort(dim=0).double() for dtype, each in scores.items()}
    for dtype, least in (("int8", 0.99), ("fp8", 0.98)):
        for q in range(12):
            pair = torch.stack([ranks[dtype][:, q], ranks["float32"][:, q]])
            assert torch.corrcoef(pair)[0, 1] > least


def test_a_smaller_store_knows_its_training_data_too(tmp_path):
    model, train, _, _ = cached(tmp_path / "whole")
    compress(tmp_path / "whole", tmp_path / "small", rank=4, progress=False)
    influence(model, tmp_path / "small").cache(train)
    with pytest.raises(StoreError, match="some of its samples are not"):
        influence(model, tmp_path / "small").cache([train[0], train[0], *train[2:]])
