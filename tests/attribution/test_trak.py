import copy
import math

import pytest
import torch
import zoo
from safetensors.torch import save_file

from grass_lib.attribution import TRAK
from grass_lib.errors import GrassError, SpecError, UsageError
from grass_lib.gradients import margin
from grass_lib.projection import build_projector

N, M = 17, 5
GRID = [1e-4, 1e-2, 0.1, 1.0, 10.0]
SPECS = ["sjlt-8", "normal-32", "random_mask-10", "random_mask-20->sjlt-8", "identity"]


def states(name: str = "mlp", n: int = 3):
    return [zoo.make_model(name, seed=10 + c).state_dict() for c in range(n)]


def loaders(name: str = "mlp", batch_size: int = 4):
    train, query = zoo.make_samples(name, N), zoo.make_samples(name, M, seed=2)
    return zoo.make_loader(train, batch_size, name), zoo.make_loader(query, batch_size, name)


def reference(spec: str, checkpoints, damping, *, convention="relative", name="mlp", seed=0):
    """TRAK from its definition: float64, explicit projection matrix, explicit inverse, one backward pass per sample."""
    train, query = zoo.make_samples(name, N), zoo.make_samples(name, M, seed=2)
    total, weight = 0.0, 0.0
    for c, state in enumerate(checkpoints):
        model = zoo.make_model(name)
        model.load_state_dict(state)
        model = model.double().eval()

        def rows(samples, model=model):
            wide = tuple(value.double() if value.is_floating_point() else value for value in samples)

            def value_of(used, index):
                return margin(used, zoo.make_batch(name, tuple(value[index : index + 1] for value in wide)))[0]

            values = torch.stack([value_of(model, index).detach() for index in range(len(samples[-1]))])
            return zoo.loop_gradients(model, value_of, len(samples[-1])), values

        gradients, values = rows(train)
        p = gradients.shape[1]
        projector = build_projector(spec, p, seed=seed, checkpoint=c, dtype=torch.float64)
        matrix = projector(torch.eye(p, dtype=torch.float64))
        factor = 1.0 if convention == "relative" else projector.paper_scale / math.sqrt(p)
        phi, phi_query = factor * gradients @ matrix, factor * rows(query)[0] @ matrix
        k = phi.shape[1]
        gram = phi.T @ phi
        shift = damping * torch.trace(gram) / k if convention == "relative" else damping
        total = total + phi @ torch.linalg.inv(gram + shift * torch.eye(k, dtype=torch.float64)) @ phi_query.T
        weight = weight + (1 - torch.sigmoid(values))
    n = len(checkpoints)
    return (total / n) * (weight / n)[:, None]


@pytest.mark.parametrize("convention", ["relative", "paper"])
def test_agrees_with_the_definition_for_every_spec_and_damping(convention):
    train, query = loaders()
    checkpoints = states()
    trak = TRAK(zoo.make_model("mlp"), checkpoints, specs=SPECS, convention=convention)
    trak.cache(train)
    found = trak.attribute(query, damping=GRID)
    assert list(found) == SPECS
    for spec in SPECS:
        assert found[spec].shape == (len(GRID), N, M)
        assert found[spec].dtype == torch.float32
        for index, damping in enumerate(GRID):
            expected = reference(spec, checkpoints, damping, convention=convention)
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[spec][index].double(), expected, atol=2e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("convention", ["relative", "paper"])
@pytest.mark.parametrize("method", ["cholesky", "eigh"])
def test_float64_agrees_to_rounding(convention, method):
    checkpoints = [{key: value.double() for key, value in state.items()} for state in states()]
    samples, queries = zoo.make_samples("mlp", N), zoo.make_samples("mlp", M, seed=2)
    train = zoo.make_loader((samples[0].double(), samples[1]))
    query = zoo.make_loader((queries[0].double(), queries[1]))
    trak = TRAK(
        zoo.make_model("mlp", dtype=torch.float64),
        checkpoints,
        specs=["sjlt-8", "random_mask-30"],
        convention=convention,
        method=method,
        dtype=torch.float64,
    )
    trak.cache(train)
    for spec, found in trak.attribute(query, damping=[1e-2]).items():
        expected = reference(spec, checkpoints, 1e-2, convention=convention)
        torch.testing.assert_close(found[0], expected, atol=1e-9 * float(expected.abs().max()), rtol=1e-7)


def test_the_conventions_differ_in_damping_only():
    """Absolute damping on scaled features equals relative damping of the right size."""
    train, query = loaders()
    checkpoints = states(n=1)
    relative = TRAK(zoo.make_model("mlp"), checkpoints, projection="random_mask-10")
    paper = TRAK(zoo.make_model("mlp"), checkpoints, projection="random_mask-10", convention="paper")
    relative.cache(train)
    paper.cache(train)
    mask = build_projector("random_mask-10", relative.p)
    assert mask.paper_scale == pytest.approx(math.sqrt(10 / relative.p))
    mean = float(relative._train[0]["random_mask-10"].double().pow(2).sum()) / 10
    absolute = 0.3 * mean * (10 / relative.p) / relative.p
    torch.testing.assert_close(paper.attribute(query, absolute), relative.attribute(query, 0.3), rtol=1e-4, atol=1e-6)


def test_the_pair_of_strings_gives_a_tensor_and_a_single_damping_drops_the_axis():
    train, query = loaders()
    pair = TRAK(zoo.make_model("mlp"), states(), sparsification="random_mask-20", projection="sjlt-8", seed=4)
    pair.cache(train)
    grid = pair.attribute(query, damping=[0.1, 1.0])
    assert grid.shape == (2, N, M)
    torch.testing.assert_close(pair.attribute(query, damping=0.1), grid[0])
    torch.testing.assert_close(pair.attribute(query, damping=torch.tensor([1.0]))[0], grid[1])
    several = TRAK(zoo.make_model("mlp"), states(), specs=["random_mask-20->sjlt-8", "sjlt-8"], seed=4)
    several.cache(train)
    torch.testing.assert_close(several.attribute(query, damping=0.1)["random_mask-20->sjlt-8"], grid[0])
    other = TRAK(zoo.make_model("mlp"), states(), sparsification="random_mask-20", projection="sjlt-8", seed=5)
    other.cache(train)
    assert not torch.allclose(other.attribute(query, damping=0.1), grid[0], rtol=0.1)


class Counting(zoo.MLP):
    """Counts its forward passes itself."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("specs", [["sjlt-8"], [f"sjlt-{k}" for k in range(2, 14)]])
@pytest.mark.parametrize("damping", [0.1, [10.0**e for e in range(-7, 3)]])
def test_one_gradient_pass_per_checkpoint_whatever_the_dampings_and_specs(specs, damping):
    train, query = loaders(batch_size=4)
    model = Counting()
    trak = TRAK(model, states(n=3), specs=specs)
    assert model.calls == 0
    trak.cache(train)
    assert model.calls == trak.model_calls == 3 * math.ceil(N / 4)
    trak.attribute(query, damping=damping)
    assert model.calls == trak.model_calls == 3 * math.ceil(N / 4) + 3 * math.ceil(M / 4)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 50}, {"micro_batch": 2}, {"buffer_bytes": 1}])
def test_batches_micro_batches_and_buffers_change_nothing(options):
    expected = scores_of()
    batch_size = options.pop("batch_size", 4)
    torch.testing.assert_close(scores_of(batch_size, **options), expected, rtol=1e-3, atol=1e-5)


def scores_of(batch_size=4, **options):
    train, query = loaders(batch_size=batch_size)
    trak = TRAK(zoo.make_model("mlp"), states(), projection="sjlt-8", **options)
    trak.cache(train)
    return trak.attribute(query)


def test_the_order_of_samples_moves_rows_and_columns_only():
    train, query = zoo.make_samples("mlp", N), zoo.make_samples("mlp", M, seed=2)
    order, turn = torch.randperm(N, generator=torch.Generator().manual_seed(0)), torch.arange(M).flip(0)
    trak = TRAK(zoo.make_model("mlp"), states(), projection="sjlt-8")
    trak.cache(zoo.make_loader(tuple(value[order] for value in train)))
    moved = trak.attribute(zoo.make_loader(tuple(value[turn] for value in query)))
    torch.testing.assert_close(moved, scores_of()[order][:, turn], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["frozen", "tied", "named", "normed", "twice", "unused"])
def test_awkward_models_agree_with_the_definition(name):
    train, query = loaders(name)
    model = zoo.make_model(name)
    checkpoints = states(name, 2)
    trak = TRAK(model, checkpoints, projection="normal-6")
    trak.cache(train)
    found = trak.attribute(query, damping=0.1)
    expected = reference("normal-6", checkpoints, 0.1, name=name)
    torch.testing.assert_close(found.double(), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)
    assert all(module.training for module in model.modules())


def test_training_on_a_sample_raises_the_output_of_queries_with_positive_scores():
    """At large damping scores are a multiple of the first-order change of the margin by one SGD step on the sample."""
    x, y = zoo.make_samples("mlp", N, dtype=torch.float64)
    qx, qy = zoo.make_samples("mlp", M, seed=2, dtype=torch.float64)
    model = zoo.make_model("mlp", dtype=torch.float64)
    trak = TRAK(model, [model.state_dict()], dtype=torch.float64)
    trak.cache(zoo.make_loader((x, y)))
    scores = trak.attribute(zoo.make_loader((qx, qy)), damping=1e9)
    rate, changes = 1e-5, torch.empty(N, M, dtype=torch.float64)
    before = margin(copy.deepcopy(model).eval(), (qx, qy)).detach()
    for index in range(N):
        trained = copy.deepcopy(model).eval()
        optimizer = torch.optim.SGD(trained.parameters(), lr=rate)
        torch.nn.functional.cross_entropy(trained(x[index : index + 1]), y[index : index + 1]).backward()
        optimizer.step()
        changes[index] = margin(trained, (qx, qy)).detach() - before
    clear = changes.abs() > 1e-3 * changes.abs().max()
    assert clear.sum() > N
    assert torch.equal(scores.sign()[clear], changes.sign()[clear])
    torch.testing.assert_close(scores / scores.abs().max(), changes / changes.abs().max(), atol=1e-3, rtol=0)


def test_checkpoint_files_and_cache_device_change_nothing(tmp_path):
    checkpoints = states()
    for c, state in enumerate(checkpoints):
        save_file(state, tmp_path / f"{c}.safetensors")
    train, query = loaders()
    paths = [tmp_path / f"{c}.safetensors" for c in range(3)]
    trak = TRAK(zoo.make_model("mlp", seed=77), paths, projection="sjlt-8", cache_device="cpu", device="cpu")
    trak.cache(train)
    torch.testing.assert_close(trak.attribute(query), scores_of(), atol=0, rtol=0)


def test_half_precision_features_stay_close():
    torch.testing.assert_close(scores_of(dtype=torch.bfloat16), scores_of(), atol=0.05, rtol=0.05)


def test_weights_may_be_replaced():
    flat = scores_of(weight=torch.ones_like)
    train, _ = loaders()
    trak = TRAK(zoo.make_model("mlp"), states(), projection="sjlt-8")
    trak.cache(train)
    probability = torch.stack([torch.sigmoid(values) for values in trak._train_values]).mean(dim=0)
    torch.testing.assert_close(scores_of(), flat * (1 - probability)[:, None], rtol=1e-4, atol=1e-6)


def test_timings_name_every_spec():
    train, query = loaders()
    trak = TRAK(zoo.make_model("mlp"), states(), specs=["sjlt-8", "normal-4"])
    trak.cache(train)
    assert trak.timings["gradients"] > 0
    assert set(trak.timings["projection"]) == {"sjlt-8", "normal-4"}
    for name, parts in trak.timings["projection_by_checkpoint"].items():
        assert len(parts) == trak.n_checkpoints
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(trak.timings["projection"][name])
    trak.attribute(query, damping=[0.1, 1.0])
    assert set(trak.timings["scores"]) == set(trak.timings["query_projection"]) == {"sjlt-8", "normal-4"}
    assert all(seconds > 0 for seconds in trak.timings["scores"].values())


def test_a_failed_cache_keeps_the_earlier_one_and_the_model():
    train, query = loaders()
    model = zoo.make_model("mlp")
    trak = TRAK(model, states(), projection="sjlt-8")
    trak.cache(train)
    before = trak.attribute(query)
    x, y = zoo.make_samples("mlp", N)
    x[11] = torch.inf
    with pytest.raises(GrassError, match=r"position\(s\) 11;"):
        trak.cache(zoo.make_loader((x, y)))
    torch.testing.assert_close(trak.attribute(query), before, atol=0, rtol=0)
    assert all(module.training for module in model.modules())


def test_bad_input_is_refused():
    train, query = loaders()
    model, checkpoints = zoo.make_model("mlp"), states()

    def refuse(message, checkpoints=checkpoints, **options):
        with pytest.raises(UsageError, match=message):
            TRAK(model, checkpoints, **options)

    refuse("checkpoints is empty", [], projection="sjlt-8")
    refuse("expected a list", checkpoints[0], projection="sjlt-8")
    refuse("Checkpoint 1 is a Linear", [checkpoints[0], torch.nn.Linear(1, 1)], projection="sjlt-8")
    refuse("Checkpoint 2 does not fit", [*checkpoints[:2], zoo.make_model("tied").state_dict()], projection="sjlt-8")
    refuse("cannot be read as safetensors", ["missing.safetensors"], projection="sjlt-8")
    refuse("expected one of relative, paper", projection="sjlt-8", convention="absolute")
    refuse("one of the two", projection="sjlt-8", specs=["sjlt-8"])
    refuse("specs is empty", specs=[])
    refuse("sjlt-8 twice", specs=["sjlt-8", "sjlt-8"])
    refuse("expected a list of compression", specs="sjlt-8")
    refuse("float16", projection="sjlt-8", dtype=torch.float16)
    refuse("seed is -1", projection="sjlt-8", seed=-1)
    with pytest.raises(SpecError):
        TRAK(model, checkpoints, projection="sjlt8")
    with pytest.raises(SpecError):
        TRAK(model, checkpoints, projection="random_mask-100000")
    with pytest.raises(SpecError, match=r"layer by layer.*random_mask-16"):
        TRAK(model, checkpoints, sparsification="random_mask-4*4", projection="sjlt-8")

    trak = TRAK(model, checkpoints, projection="sjlt-8")
    with pytest.raises(UsageError, match="call cache"):
        trak.attribute(query)
    with pytest.raises(UsageError, match="no samples"):
        trak.cache([])
    with pytest.raises(UsageError, match="shuffle=False"):
        trak.cache(torch.utils.data.DataLoader(train.dataset, batch_size=4, shuffle=True))
    with pytest.raises(UsageError, match="drop_last"):
        trak.cache(torch.utils.data.DataLoader(train.dataset, batch_size=4, drop_last=True))
    with pytest.raises(UsageError, match=r"walk for checkpoint 1.*not a generator"):
        trak.cache(iter(list(train)))
    noisy = [tuple(part + torch.rand(()) if part.is_floating_point() else part for part in batch) for batch in train]
    walks = iter([list(train), noisy, noisy])
    with pytest.raises(UsageError, match="random augmentation"):
        trak.cache(type("Augmenting", (), {"__iter__": lambda self: iter(next(walks))})())
    trak.cache(train)
    for damping, seen in (
        (0.0, "0.0"),
        ([0.1, -1.0], "-1.0"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ([], "empty"),
    ):
        with pytest.raises(UsageError, match=seen):
            trak.attribute(query, damping=damping)
    with pytest.raises(UsageError, match="no samples"):
        trak.attribute([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("cache_device", [None, "cpu"])
def test_gpu_gives_the_same_scores_and_leaves_the_model_on_the_cpu(cache_device):
    train, query = loaders("normed")
    model, checkpoints = zoo.make_model("normed"), states("normed")
    scores = {}
    for device in ("cpu", "cuda"):
        trak = TRAK(model, checkpoints, specs=SPECS, device=device, cache_device=cache_device)
        trak.cache(train)
        assert trak._train[0]["sjlt-8"].device.type == (cache_device or device)
        scores[device] = trak.attribute(query, damping=GRID)
        assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    for spec in SPECS:
        assert scores["cuda"][spec].device.type == "cuda"
        scale = float(scores["cpu"][spec].abs().max())
        torch.testing.assert_close(scores["cuda"][spec].cpu(), scores["cpu"][spec], atol=1e-4 * scale, rtol=1e-3)
