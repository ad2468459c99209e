"""Influence functions against the explicit formula on gradients from a plain loop of backward passes."""

import functools
import inspect
import time

import pytest
import torch
import zoo
from torch.utils.data import DataLoader, TensorDataset

from grass_lib.attribution import caching, topk
from grass_lib.attribution.caching import default_shard_size
from grass_lib.attribution.influence import InfluenceFunction
from grass_lib.attribution.presets import FactGraSS, InfluenceOptions, LoGra, factgrass_spec, logra_spec
from grass_lib.attribution.scoring import score_shards
from grass_lib.errors import GrassError, StoreError, UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.outputs import cross_entropy, margin
from grass_lib.store import GradientStore

N, QUERIES = 23, 5
LAYERS = ("hidden", "head")


def case(n=N, seed=0, dtype=torch.float32):
    """Model, training batches of 4 and query batches of 2."""
    model = zoo.make_model("mlp", dtype=dtype)
    samples = zoo.make_samples("mlp", n + QUERIES, seed=seed, dtype=dtype)
    batch = zoo.make_batch("mlp", samples)
    train, query = tuple(part[:n] for part in batch), tuple(part[n:] for part in batch)
    return model, cut(train, 4), cut(query, 2)


def cut(batch, size):
    return [tuple(part[start : start + size] for part in batch) for start in range(0, len(batch[0]), size)]


def influence(model, **options):
    options = {"shard_size": 8, "progress": False} | options
    return InfluenceFunction(model, options.pop("loss", cross_entropy), **options)


def plain_gradients(model, batches, output, layers=LAYERS):
    """Weight and bias gradients of each sample, ``{layer: (n, d_out * (d_in + 1))}``, in float64."""
    model.eval()
    rows = {name: [] for name in layers}
    for batch in batches:
        for i in range(len(batch[0])):
            value = output(model, tuple(part[i : i + 1] for part in batch))[0]
            for name in layers:
                module = model.get_submodule(name)
                found = torch.autograd.grad(
                    value, [module.weight, module.bias], retain_graph=True, materialize_grads=True, allow_unused=True
                )
                rows[name].append(torch.cat([found[0], found[1][:, None]], dim=1).double().flatten())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def explicit(train, query, damping):
    """Scores by the inverse of the damped matrix, layer by layer."""
    total = 0.0
    for name, g in train.items():
        k = g.shape[1]
        fisher = g.mT @ g / len(g)
        if float(fisher.trace()) == 0.0:
            continue
        shift = damping * fisher.trace() / k
        total = total + g @ torch.linalg.inv(fisher + shift * torch.eye(k, dtype=g.dtype)) @ query[name].mT
    return total


def stored_rows(found):
    """What is in the store, in float64."""
    shards = [found.store.read(number) for number in range(found.store.n_shards)]
    return {name: torch.cat([shard[name] for shard in shards]).double() for name in found.sizes}


def error(found, wanted):
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("n", [9, 60])  # fewer samples than features in both layers, in one of them
@pytest.mark.parametrize("damping", [1e-2, 0.1, 10.0])
def test_equals_the_explicit_formula(n, damping):
    model, train, query = case(n)
    found = influence(model)
    found.cache(train)
    assert found.sizes == {"hidden": 35, "head": 18}
    wanted = explicit(
        plain_gradients(model, train, cross_entropy), plain_gradients(model, query, cross_entropy), damping
    )
    assert error(found.attribute(query, damping), wanted) < 1e-4


@pytest.mark.parametrize("n", [9, 60])
def test_float64_agrees_to_rounding(n):
    model, train, query = case(n, dtype=torch.float64)
    found = influence(model, precision="float64")
    found.cache(train)
    rows = stored_rows(found)
    own = plain_gradients(model, train, cross_entropy)
    assert all(error(rows[name], own[name]) < 1e-6 for name in own)  # rounded to the store's float32
    wanted = explicit(rows, plain_gradients(model, query, cross_entropy), 1e-3)
    assert error(found.attribute(query, 1e-3), wanted) < 1e-9
    assert found.attribute(query, 1e-3).dtype == torch.float64
    assert max(found.residuals.values()) < 1e-13


def test_a_grid_is_its_single_values_and_the_first_axis():
    model, train, query = case()
    found = influence(model, precision="float64")
    found.cache(train)
    grid = [1e-3, 0.1, 5.0]
    scores = found.attribute(query, grid)
    assert scores.shape == (3, N, QUERIES)
    for place, damping in enumerate(grid):
        torch.testing.assert_close(scores[place], found.attribute(query, damping), rtol=1e-10, atol=1e-10)
    assert found.attribute(query, [0.1]).shape == (1, N, QUERIES)
    assert found.self_influence(grid).shape == (3, N)
    torch.testing.assert_close(found.self_influence(grid)[1], found.self_influence(0.1))


@pytest.mark.parametrize("hessian", ["eFIM", "Identity"])
def test_self_influence_is_the_diagonal(hessian):
    model, train, _ = case()
    found = influence(model, hessian=hessian)
    found.cache(train)
    diagonal = found.attribute(train).diagonal()
    torch.testing.assert_close(found.self_influence(), diagonal, rtol=1e-4, atol=1e-5)
    assert bool((diagonal > 0).all())


def test_identity_is_the_plain_inner_product():
    model, train, query = case()
    found = influence(model, hessian="Identity")
    found.cache(train)
    g, h = plain_gradients(model, train, cross_entropy), plain_gradients(model, query, cross_entropy)
    wanted = sum(g[name] @ h[name].mT for name in g)
    assert error(found.attribute(query), wanted) < 1e-5
    torch.testing.assert_close(found.attribute(query, 3.0), found.attribute(query))
    with pytest.raises(UsageError, match="hessian 'Identity' has none"):
        found.attribute(query, [0.1, 1.0])


def test_topk_is_that_of_the_whole_matrix():
    model, train, query = case()
    found = influence(model)
    found.cache(train)
    wanted, streamed = topk(found.attribute(query, 0.1), 4), found.topk(query, 4, 0.1)
    assert torch.equal(streamed.indices, wanted.indices)
    assert torch.equal(streamed.scores, wanted.scores)
    with pytest.raises(UsageError, match="k is 24"):
        found.topk(query, 24)
    with pytest.raises(UsageError, match="grid of 2"):
        found.topk(query, 2, [0.1, 1.0])


def test_queries_in_several_passes(monkeypatch):
    model, train, query = case()
    found = influence(model)
    found.cache(train)
    whole, best = found.attribute(query, [0.1, 1.0]), found.topk(query, 3)
    passes = []

    def counted(store, prepared, *rest):
        passes.append(len(prepared["head"]))
        return score_shards(store, prepared, *rest)

    monkeypatch.setattr("grass_lib.attribution.scoring.score_shards", counted)
    monkeypatch.setattr("grass_lib.attribution.scoring.CPU_QUERY_BYTES", 3 * 4 * (53 * 3 + 2 * 8))
    torch.testing.assert_close(found.attribute(query, [0.1, 1.0]), whole)
    assert passes == [2 * 3, 2 * 2]  # five queries, at most three at once, two damping values each
    monkeypatch.setattr("grass_lib.attribution.scoring.CPU_QUERY_BYTES", 1)
    torch.testing.assert_close(found.attribute(query, [0.1, 1.0]), whole)
    assert passes[2:] == [2] * 5
    assert torch.equal(found.topk(query, 3).indices, best.indices)


def test_the_target_and_its_sign():
    model, train, query = case()
    plain = influence(model)
    plain.cache(train)
    scores = plain.attribute(query)
    negative = influence(model, target=lambda model, batch: -cross_entropy(model, batch))
    negative.cache(train)
    assert torch.equal(negative.attribute(query), scores)
    other = influence(model, target=margin)
    other.cache(train)
    g = plain_gradients(model, train, cross_entropy)
    h = plain_gradients(model, query, lambda model, batch: -margin(model, batch))
    assert error(other.attribute(query), explicit(g, h, 0.1)) < 1e-4


def test_a_step_on_a_proponent_raises_the_target():
    """The sign, by training: a gradient step on the best proponent helps the query, one on the worst opponent harms."""
    model, train, query = case(40)
    model.eval()
    found = influence(model, target=margin, hessian="Identity")
    found.cache(train)
    best = found.topk(query, 1)
    for place, one in enumerate(cut(tuple(torch.cat(parts) for parts in zip(*query, strict=True)), 1)):
        before = float(margin(model, one).detach())
        for side, sign in ((best.proponents, 1), (best.opponents, -1)):
            index = int(side[place, 0])
            sample = tuple(part[index % 4 : index % 4 + 1] for part in train[index // 4])
            moved = zoo.make_model("mlp").eval()
            loss = cross_entropy(moved, sample).sum()
            weights = list(moved.parameters())
            with torch.no_grad():
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight -= 0.01 * gradient
            assert sign * (float(margin(moved, one).detach()) - before) > 0


def test_unused_layers_count_nothing():
    torch.manual_seed(0)
    model = zoo.make_model("unused")
    _, train, query = case()
    found = influence(model)
    found.cache(train)
    assert list(found.sizes) == ["hidden", "head", "spare"]
    scores = found.attribute(query)
    g, h = plain_gradients(model, train, cross_entropy), plain_gradients(model, query, cross_entropy)
    assert error(scores, explicit(g, h, 0.1)) < 1e-4
    assert bool(found.self_influence().isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_curvature_is_that_of_the_rows_as_stored(dtype, tmp_path):
    model, train, query = case(60)
    found = influence(model, dtype=dtype, store=tmp_path / "store")
    found.cache(train)
    rows, own = stored_rows(found), plain_gradients(model, train, cross_entropy)
    for name in own:
        torch.testing.assert_close(rows[name], own[name], rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert not torch.allclose(rows[name], own[name], rtol=torch.finfo(dtype).eps / 8, atol=1e-6)
    wanted = explicit(rows, plain_gradients(model, query, cross_entropy), 0.1)  # queries are not rounded
    assert error(found.attribute(query), wanted) < 1e-5
    assert found.store.dtype == dtype


class Interrupted(Exception):
    pass


def interrupted(batches, after):
    yield from batches[:after]
    raise Interrupted


def bits(found, query):
    files = {path.name: path.read_bytes() for path in found.store.path.glob("shard_*")}
    return files, found.attribute(query, [1e-3, 0.1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_runs_end_with_the_same_bits(tmp_path, dtype):
    model, train, query = case(60)
    whole = influence(model, store=tmp_path / "whole", dtype=dtype)
    whole.cache(train)
    files, scores = bits(whole, query)
    for after in (1, 5, 14):
        folder = tmp_path / str(after)
        with pytest.raises(Interrupted):
            influence(model, store=folder, dtype=dtype).cache(interrupted(train, after), n_samples=60)
        assert len(GradientStore.open(folder).missing()) == 8 - after // 2
        again = influence(model, store=folder, dtype=dtype)
        again.cache(train)
        assert again.timings["samples"] == 60 - after // 2 * 8
        assert bits(again, query)[0] == files
        assert torch.equal(bits(again, query)[1], scores)
    fresh = influence(model, store=tmp_path / "whole", dtype=dtype)
    assert torch.equal(fresh.attribute(query, [1e-3, 0.1]), scores)
    fresh.cache(train)
    assert fresh.timings["samples"] == 0


def test_blocks_do_not_change_the_rows(tmp_path, monkeypatch):
    model, train, query = case(60)
    whole = influence(model, store=tmp_path / "whole", shard_size=None)
    whole.cache(train)
    monkeypatch.setattr("grass_lib.attribution.curvature._BLOCK_BYTES", 5 * 4 * 53)
    parts = influence(model, store=tmp_path / "parts", shard_size=None)
    parts.cache(train)
    assert whole.store.shard_size == 1024
    assert default_shard_size(24, 4) == 768
    assert default_shard_size(16, 48 * 4096 * 4) == 256
    assert default_shard_size(500, 2**20) == 500  # a batch is never cut
    assert (whole.store.path / "shard_00000.json").read_bytes() == (parts.store.path / "shard_00000.json").read_bytes()
    scores = parts.attribute(query)
    torch.testing.assert_close(scores, whole.attribute(query), rtol=1e-4, atol=1e-5)
    assert torch.equal(influence(model, store=tmp_path / "parts", shard_size=None).attribute(query), scores)


def test_three_workers_make_the_store_of_one(tmp_path):
    model, train, query = case(60)
    one = influence(model, store=tmp_path / "one")
    one.cache(train)
    for worker in range(3):
        part = influence(model, store=tmp_path / f"part{worker}")
        part.cache(train, worker=worker, n_workers=3)
        assert part.timings["samples"] == (24, 20, 16)[worker]
        with pytest.raises(UsageError, match=r"\d of 8 shards are missing"):
            part.attribute(query)
    GradientStore.merge([tmp_path / f"part{worker}" for worker in range(3)], tmp_path / "merged")
    merged = influence(model, store=tmp_path / "merged")
    assert torch.equal(merged.attribute(query), one.attribute(query))
    assert bits(merged, query)[0] == bits(one, query)[0]
    memory = influence(model)
    for worker in range(3):
        memory.cache(train, worker=worker, n_workers=3)
    assert torch.equal(memory.attribute(query), one.attribute(query))


def test_dropped_shards_are_computed_again(tmp_path):
    model, train, query = case(60)
    found = influence(model, store=tmp_path)
    found.cache(train)
    files, scores = bits(found, query)
    found.store.drop(3)
    with pytest.raises(UsageError, match=r"1 of 8 shards are missing \(3\)"):
        found.attribute(query)
    found.cache(train)
    assert found.timings["samples"] == 8
    assert bits(found, query)[0] == files
    assert torch.equal(bits(found, query)[1], scores)


def test_compressions_meet_queries_with_the_same_maps():
    """With masks and sjlt on both sides: scores from the rows that a second pass gives."""
    model, train, query = case(60)
    found = influence(model, sparsification="random_mask-4*4", projection="sjlt-6")
    found.cache(train)
    assert found.sizes == {"hidden": 6, "head": 6}
    rows = stored_rows(found)
    asked = influence(model, sparsification="random_mask-4*4", projection="sjlt-6")
    asked.cache(query, n_samples=QUERIES)
    assert error(found.attribute(query), explicit(rows, stored_rows(asked), 0.1)) < 1e-5
    assert found.backend == "torch"


def test_loaders_and_dict_batches():
    torch.manual_seed(0)
    model = zoo.make_model("named")
    parts = zoo.make_samples("named", 10)
    batch = zoo.make_batch("named", parts)
    found = influence(model, shard_size=5)
    found.cache(
        [{name: value[:5] for name, value in batch.items()}, {name: value[5:] for name, value in batch.items()}]
    )
    assert found.attribute([batch]).shape == (10, 10)
    model, train, query = case()
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*train, strict=True)))
    lists, loader = influence(model), influence(model)
    lists.cache(train)
    loader.cache(DataLoader(data, batch_size=4))
    assert torch.equal(loader.attribute(query), lists.attribute(query))
    with pytest.raises(UsageError, match="shuffles"):
        loader.cache(DataLoader(data, batch_size=4, shuffle=True))
    with pytest.raises(UsageError, match="drops"):
        loader.cache(DataLoader(data, batch_size=4, drop_last=True))


def test_warming_up_leaves_nothing_behind(tmp_path):
    model, train, query = case()
    cold, warm = influence(model), influence(model, store=tmp_path / "warm")
    warm.warm_up(train[0])
    assert not (tmp_path / "warm").exists()
    with pytest.raises(UsageError, match="call cache"):
        warm.attribute(query)
    for found in (cold, warm):
        found.cache(train)
    assert torch.equal(warm.attribute(query), cold.attribute(query))
    assert warm.timings["samples"] == len(torch.cat([labels for _, labels in train]))


@pytest.mark.parametrize("compile", [False, True])
def test_seconds_are_those_of_the_walk(compile):
    """Whatever ran before: compilation, queries, another walk."""
    model, train, query = case()
    found = influence(model, compile=compile)
    found.warm_up(train[0])
    for _ in range(2):
        start = time.perf_counter()
        found.cache(train)
        whole = time.perf_counter() - start
        found.attribute(query)
        parts = [found.timings[name] for name in ("gradients", "compression")]
        assert min(parts) >= 0
        # The short last batch counts like the others.
        assert 0 < sum(parts) < 2 * whole
        found._kept._store = None


def test_batches_and_shards_must_fit(tmp_path):
    model, train, query = case()
    with pytest.raises(UsageError, match=r"shards of 6 samples .* batches of 4"):
        influence(model, shard_size=6, store=tmp_path / "a").cache(train)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="samples 7 to 10 reaches over the end of shard 0 at 8"):
        influence(model).cache([train[0], tuple(part[:3] for part in train[1]), *train[2:]])
    with pytest.raises(UsageError, match="give n_samples="):
        influence(model).cache(iter(train))
    with pytest.raises(UsageError, match="yielded 23 samples, and the store is for 24"):
        influence(model).cache(train, n_samples=24)
    with pytest.raises(UsageError, match="more than the 20 samples"):
        influence(model).cache(train, n_samples=20)
    with pytest.raises(UsageError, match="no batches"):
        influence(model).cache([])
    found = influence(model)
    with pytest.raises(UsageError, match=r"call cache\(train_loader\) first"):
        found.attribute(query)
    found.cache(train)
    with pytest.raises(UsageError, match="no queries"):
        found.attribute([])
    for damping in (0.0, -1.0, float("nan"), []):
        with pytest.raises(UsageError, match="damping"):
            found.attribute(query, damping)


def test_bad_arguments_are_refused():
    model, _, _ = case()
    for options, message in (
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"precision": "half"}, "precision is 'half'"),
        ({"hessian": "ekfac"}, "not a Hessian"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0"),
        ({"compile": "max-autotune"}, "compile is 'max-autotune'"),
        ({"fingerprint": {"seed": 3}}, "fingerprint has seed"),
        ({"sparsification": "sjlt-64"}, "flat"),
    ):
        with pytest.raises(UsageError, match=message):
            influence(model, **options)


def test_kernels_chosen_by_timing_are_refused():
    import torch._inductor.config as inductor

    model, _, _ = case()
    with inductor.patch(max_autotune=True):
        with pytest.raises(UsageError, match="max_autotune is on"):
            influence(model, compile=True)
        influence(model, compile=True, deterministic=False)
        influence(model)


def test_the_last_bits_matter_to_whoever_adds_rows(tmp_path):
    model, train, query = case()
    found = influence(model, store=tmp_path, deterministic=False)
    found.cache(train)
    other = influence(model, store=tmp_path)
    assert torch.equal(other.attribute(query), found.attribute(query))
    with pytest.raises(StoreError, match="deterministic is False there, True here"):
        other.cache(train)


def test_precision_belongs_to_the_question_not_to_the_store(tmp_path):
    model, train, query = case()
    found = influence(model, store=tmp_path)
    found.cache(train)
    wide = influence(model, store=tmp_path, precision="float64").attribute(query, 1e-3)
    assert error(wide, explicit(stored_rows(found), plain_gradients(model, query, cross_entropy), 1e-3)) < 1e-5
    narrow = influence(model, store=tmp_path, precision="float32").attribute(query, 1.0)
    assert error(narrow, found.attribute(query, 1.0).double()) < 1e-4


def test_another_model_or_setting_is_refused(tmp_path):
    model, train, query = case()
    found = influence(model, store=tmp_path, fingerprint={"data": "a"}, source={"experiment": "test"})
    found.cache(train)
    assert found.store.source == {"experiment": "test"}
    with pytest.raises(StoreError, match="data is a there, b here"):
        influence(model, store=tmp_path, fingerprint={"data": "b"}).attribute(query)
    loss = functools.partial(zoo_loss, scale=2.0)
    with pytest.raises(StoreError, match="loss is cross_entropy there"):
        influence(model, loss=loss, store=tmp_path, fingerprint={"data": "a"}).attribute(query)
    memory = influence(model)
    memory.cache(train)
    memory.attribute(query)
    with torch.no_grad():
        model.head.weight[0, 0] += 1.0
    for changed in (found, memory):
        with pytest.raises(StoreError, match="model is"):
            changed.attribute(query)
    memory.cache(train)
    memory.attribute(query)


def zoo_loss(model, batch, scale):
    return scale * cross_entropy(model, batch)


def test_gradients_that_are_not_finite_are_named_and_not_written(tmp_path):
    model, train, query = case(40)
    train[3][0][1, 0] = torch.nan  # sample 13, in shard 1
    found = influence(model, store=tmp_path)
    with pytest.raises(GrassError, match=r"layer hidden are not finite in torch.float32 at training sample 13;"):
        found.cache(train)
    assert 1 in GradientStore.open(tmp_path).missing()
    assert not list(tmp_path.glob("*1.safetensors"))
    clean = influence(model)
    clean.cache(case(40)[1])
    query[1][0][0] = torch.inf
    with pytest.raises(GrassError, match="at query 2"):
        clean.attribute(query)
    large = influence(model, loss=functools.partial(zoo_loss, scale=1e6), dtype=torch.float16)
    with pytest.raises(GrassError, match="bfloat16 or float32"):
        large.cache(case(40)[1])


def test_the_model_stays_as_it_was():
    model, train, query = case()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = influence(model)
    found.cache(train)
    found.attribute(query)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.hidden._forward_hooks


def test_timings_say_where_the_seconds_went():
    model, train, query = case()
    found = influence(model)
    found.cache(train)
    assert found.timings["samples"] == N
    assert found.timings["gradients"] > 0
    assert found.timings["scoring"] == 0
    cached = dict(found.timings)
    found.attribute(query)
    assert found.timings["scoring"] > 0
    assert found.timings["query_gradients"] > 0
    assert found.timings["curvature"] > cached["curvature"] > 0
    assert found.timings["gradients"] == cached["gradients"]


def test_presets():
    assert str(logra_spec(4096)) == str(logra_spec()) == "normal-64*64->identity"
    assert str(factgrass_spec(4096)) == "random_mask-128*128->sjlt-4096"
    assert str(factgrass_spec(6, 6)) == "random_mask-6*6->sjlt-6"
    with pytest.raises(UsageError, match=r"k is 5000, .* nearest is 5041 = 71\^2"):
        logra_spec(5000)
    with pytest.raises(UsageError, match=r"blowup \* k is 8192"):
        factgrass_spec(4096, 2)
    model, train, query = case()
    for found in (
        LoGra(model, cross_entropy, k=9, progress=False),
        FactGraSS(model, cross_entropy, k=4, progress=False),
    ):
        found.cache(train)
        assert found.attribute(query).shape == (N, QUERIES)


def test_other_training_data_are_not_those_of_the_store(tmp_path):
    model, train, query = case()
    _, other, _ = case(seed=3)
    kept = influence(model, store=tmp_path / "store")
    kept.cache(train)
    again = influence(model, store=tmp_path / "store")
    again.cache(train)
    assert again.timings["samples"] == 0
    with pytest.raises(StoreError, match="other training data"):
        influence(model, store=tmp_path / "store").cache(other)
    relabelled = [(x, (y + 1) % 3 if i == 3 else y) for i, (x, y) in enumerate(train)]
    with pytest.raises(StoreError, match="some of its samples are not"):
        influence(model, store=tmp_path / "store").cache(relabelled)
    # Another batch size is the same data.
    influence(model, store=tmp_path / "store").cache(cut(tuple(map(torch.cat, zip(*train, strict=True))), 2))
    memory = influence(model)
    memory.cache(train)
    memory.cache(other)
    fresh = influence(model)
    fresh.cache(other)
    assert memory.timings["samples"] == N
    assert torch.equal(memory.attribute(query), fresh.attribute(query))
    memory.cache(relabelled)
    memory.cache(other)
    assert torch.equal(memory.attribute(query), fresh.attribute(query))
    assert error(memory.attribute(query), kept.attribute(query)) > 0.1


def test_a_weight_that_was_changed_behind_its_back_is_noticed():
    model, train, query = case()
    found = influence(model)
    found.cache(train)
    model.head.weight.data.mul_(2)
    with pytest.raises(StoreError, match="model"):
        found.attribute(query)


def test_queries_have_an_order_too():
    model, train, query = case()
    found = influence(model)
    found.cache(train)
    data = TensorDataset(*map(torch.cat, zip(*query, strict=True)))
    with pytest.raises(UsageError, match="shuffle=False"):
        found.attribute(DataLoader(data, batch_size=2, shuffle=True))


def test_a_whole_store_takes_batches_of_any_size(tmp_path):
    model, train, query = case()
    influence(model, store=tmp_path / "store").cache(train)
    found = influence(model, store=tmp_path / "store")
    found.cache(cut(tuple(map(torch.cat, zip(*train, strict=True))), 5))  # shards of 8 are cut within batches of 5
    assert found.timings["samples"] == 0
    assert found.attribute(query).shape == (N, QUERIES)


def test_an_empty_first_batch_is_refused():
    model, train, _ = case()
    with pytest.raises(UsageError, match="first batch has no samples"):
        influence(model).cache([tuple(part[:0] for part in train[0]), *train])


def test_presets_take_the_arguments_of_influence_functions():
    parameters = inspect.signature(InfluenceFunction).parameters
    expected = {name: item.annotation for name, item in parameters.items() if item.kind is item.KEYWORD_ONLY}
    for name in ("sparsification", "projection"):
        del expected[name]
    declared = {name: item.__forward_arg__ for name, item in InfluenceOptions.__annotations__.items()}
    assert declared == expected


def test_rows_that_the_machine_cannot_hold_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    model, train, _ = case()
    k = FactoredGradients(model, cross_entropy).k
    monkeypatch.setattr(caching, "memory_bytes", lambda: 8 * k * 4)  # a shard of 8 samples and no more
    influence(model, store=tmp_path / "fits").cache(train)
    with pytest.raises(UsageError, match=r"the store in memory takes .* expected .*, or store= and a folder"):
        influence(model).cache(train)
    with pytest.raises(UsageError, match=rf"a shard takes .* \(12 samples of {k:,} features\).* a smaller shard_size"):
        influence(model, store=tmp_path / "large", shard_size=12).cache(train)
    assert not (tmp_path / "large").exists()
    monkeypatch.setattr(caching, "memory_bytes", lambda: 1)
    influence(model, store=tmp_path / "fits").cache(train)  # whole: nothing is computed
