"""Captured gradients against full float64 gradients, compressed afterwards by the same projectors."""

import copy

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional

from grass_lib.errors import SpecError, UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.layers import describe, find_layers, output_layer
from grass_lib.gradients.outputs import cross_entropy
from grass_lib.projection import Mask, build_projector
from grass_lib.specs import StageSpec

N = 6
STAGE1 = ("identity", "random_mask-4*3", "normal-4*3", "rademacher-3*4", "sjlt-4*3", "sjlt_2-4*4")
MODELS = ("text", "image", "mlp", "twice", "unused", "tied", "conv1d")


def text_loss(model, batch):
    """Sum over a sample's own tokens; 0 is padding."""
    (ids,) = batch
    logits = model(ids)
    following = functional.pad(ids[:, 1:], (0, 1)).masked_fill(functional.pad(ids[:, 1:], (0, 1)) == 0, -100)
    losses = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100, reduction="none")
    return losses.view(ids.shape).sum(dim=1)


def case(name, n=N, dtype=torch.float32):
    """A model in training mode, a batch of ``n`` samples, a loss."""
    model = zoo.make_model(name, dtype=dtype)
    samples = zoo.make_samples(name, n, dtype=dtype)
    return model, zoo.make_batch(name, samples), text_loss if name == "text" else cross_entropy


def matrix_of(module, kind, gradients):
    """The gradient of a layer as a matrix, output side first, bias or norm's bias as last column."""
    weight, *bias = gradients
    if kind in ("layernorm", "rmsnorm"):
        return torch.stack([weight, *bias], dim=1)
    if kind in ("conv1d", "embedding"):
        weight = weight.mT
    columns = [weight.reshape(len(weight), -1), *(part[:, None] for part in bias)]
    return torch.cat(columns, dim=1)


def expected(name, spec1, spec2, layers, seed=0, n=N):
    """Full gradients in float64, one backward pass per sample and layer by layer, then the projectors."""
    model, batch, loss = case(name, n, torch.float64)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    stage1, stage2 = StageSpec.parse(spec1), StageSpec.parse(spec2)
    modules = dict(model.named_modules())
    if name == "tied":  # each use of the shared matrix has its own gradient
        modules["head"].weight = nn.Parameter(modules["head"].weight.detach().clone())
    result = {layer: [] for layer in layers}
    for i in range(n):
        value = loss(model, tuple(part[i : i + 1] for part in batch))[0]
        for layer in layers:
            own = list(modules[layer].parameters(recurse=False))
            found = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(own, found, strict=True)]
            shape = describe(modules[layer])[0]
            matrix = matrix_of(modules[layer], shape.kind, found)
            assert matrix.shape == (shape.d_out, shape.d_in)
            for place, side in enumerate(("output", "input")):
                whole = stage1.is_identity or (stage1.is_mask and stage1.dims[place] >= matrix.shape[place])
                if whole or (side == "input" and shape.kind in ("layernorm", "rmsnorm")):
                    continue
                flat = StageSpec(stage1.family, (stage1.dims[place],), stage1.param)
                p = build_projector(flat, matrix.shape[place], seed=seed, name=f"{layer}/{side}", dtype=torch.float64)
                matrix = p(matrix.mT).mT if place == 0 else p(matrix)
            row = matrix.flatten()
            if stage2.k is not None and stage2.k < len(row):
                row = build_projector(stage2, len(row), seed=seed, name=layer, dtype=torch.float64)(row)
            result[layer].append(row)
    return {layer: torch.stack(rows) for layer, rows in result.items()}


def assert_equal(found, wanted, tolerance=1e-5):
    assert list(found) == list(wanted)
    for layer, rows in wanted.items():
        error = (found[layer].double() - rows).norm() / rows.norm().clamp_min(1e-12)
        assert error < tolerance, f"{layer}: {error}"


@pytest.mark.parametrize("projection", ["identity", "sjlt-5", "normal-5"])
@pytest.mark.parametrize("sparsification", STAGE1)
@pytest.mark.parametrize("name", MODELS)
def test_equals_full_gradients_then_the_projectors(name, sparsification, projection):
    model, batch, loss = case(name)
    factored = FactoredGradients(
        model, loss, layers="all", include_head=True, sparsification=sparsification, projection=projection
    )
    found, values = factored(batch)
    assert {layer: rows.shape[1] for layer, rows in found.items()} == factored.sizes
    assert_equal(found, expected(name, sparsification, projection, factored.layers))
    torch.testing.assert_close(values, loss(model.eval(), batch).detach())
    assert sum(factored.sizes.values()) == factored.k


def test_float64_agrees_to_rounding():
    model, batch, loss = case("text", dtype=torch.float64)
    factored = FactoredGradients(
        model, loss, layers="all", sparsification="normal-4*3", projection="sjlt-5", dtype=torch.float64
    )
    assert_equal(factored(batch)[0], expected("text", "normal-4*3", "sjlt-5", factored.layers), 1e-13)


def test_bfloat16_models_are_near():
    model, batch, loss = case("text")
    factored = FactoredGradients(
        model.bfloat16(), loss, layers="linear", sparsification="rademacher-4*3", projection="sjlt-5"
    )
    found, _ = factored(batch)
    assert all(rows.dtype == torch.float32 for rows in found.values())
    assert_equal(found, expected("text", "rademacher-4*3", "sjlt-5", factored.layers), 0.05)


@pytest.mark.parametrize("name", ["text", "image", "twice"])
@pytest.mark.parametrize("size", [1, 4])
def test_batch_mates_do_not_matter(name, size):
    model, batch, loss = case(name)
    options = {"layers": "all", "sparsification": "random_mask-4*3", "projection": "sjlt-5", "dtype": torch.float64}
    factored = FactoredGradients(model.double(), loss, **options)
    batch = tuple(part.double() if part.is_floating_point() else part for part in batch)
    whole, _ = factored(batch)
    pieces = [factored(tuple(part[i : i + size] for part in batch))[0] for i in range(0, N, size)]
    for layer, rows in whole.items():
        torch.testing.assert_close(torch.cat([piece[layer] for piece in pieces]), rows, rtol=1e-12, atol=1e-12)


def test_padding_does_not_matter():
    model, (ids,), loss = case("text", dtype=torch.float64)
    factored = FactoredGradients(model, loss, layers="all", sparsification="sjlt-4*3", dtype=torch.float64)
    short, _ = factored((ids[:, :4],))
    padded, _ = factored((functional.pad(ids[:, :4], (0, 5)),))
    for layer, rows in short.items():
        torch.testing.assert_close(padded[layer], rows, rtol=1e-12, atol=1e-12)


def test_frozen_weights_change_nothing():
    model, batch, loss = case("text")
    options = {"layers": "all", "sparsification": "normal-4*3"}
    trainable, _ = FactoredGradients(model, loss, **options)(batch)
    frozen, _ = FactoredGradients(copy.deepcopy(model).requires_grad_(False), loss, **options)(batch)
    assert all(torch.equal(trainable[layer], rows) for layer, rows in frozen.items())


def test_compiled_equals_uncompiled_without_a_break():
    model, batch, loss = case("text")
    options = {"layers": "all", "sparsification": "random_mask-4*3", "projection": "sjlt-5"}
    plain, _ = FactoredGradients(model, loss, **options)(batch)
    compiled = FactoredGradients(model, loss, compile=True, **options)
    torch._dynamo.utils.counters.clear()
    found, _ = compiled(batch)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_equal(
        {layer: rows for layer, rows in found.items()}, {layer: rows.double() for layer, rows in plain.items()}
    )
    shorter, _ = compiled(tuple(part[:2] for part in batch))  # another size runs uncompiled
    assert_equal(shorter, {layer: rows[:2].double() for layer, rows in plain.items()})
    assert compiled.compiled_size == N


def test_saves_only_the_kept_columns_of_an_input():
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).requires_grad_(True)
    factored = FactoredGradients(model, lambda m, b: m(b[0]).square().sum(dim=(1, 2)), sparsification="random_mask-4*3")
    x, saved = torch.randn(5, 7, 64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        factored((x,))
    assert (5, 7, 3) in saved
    assert saved.count((5, 7, 64)) <= 1  # what the square itself saves


def test_nothing_runs_below_the_lowest_layer_and_no_weight_gets_a_gradient():
    calls = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append(1)
            return gradient

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.high(Watched.apply(self.low(x)))

    model, (x, y) = Model(), zoo.make_samples("mlp", N)
    FactoredGradients(model, cross_entropy, layers="high")((x, y))
    assert not calls
    FactoredGradients(model, cross_entropy, layers="linear")((x, y))
    assert calls
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_output_and_no_gradient_mode():
    model, batch, loss = case("mlp", dtype=torch.float64)
    factored = FactoredGradients(model, loss, dtype=torch.float64)
    with torch.no_grad():
        first, values = factored(batch)
        second, doubled = factored(batch, output=lambda m, b: -2 * loss(m, b))
    torch.testing.assert_close(doubled, -2 * values)
    for layer in first:
        torch.testing.assert_close(second[layer], -2 * first[layer])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, batch, loss = case("text")
    model.head.weight.requires_grad_(False)
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]

    def broken(used, given):
        raise RuntimeError("stop")

    factored = FactoredGradients(model, broken if fails else loss, layers="all")
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            factored(batch)
    else:
        factored(batch)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("sparsification", ["identity", "random_mask-3*4", "normal-4*3"])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("compile", [False, True])
def test_activations_in_place_change_nothing(sparsification, tokens, compile):
    def build(inplace):
        torch.manual_seed(0)
        layers = [
            nn.Linear(6, 8),
            nn.ReLU(inplace),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.ReLU(inplace),
            nn.Linear(8, 3),
        ]
        return nn.Sequential(*layers)

    def loss(model, batch):
        values, labels = batch
        values = values[:, None] + torch.arange(tokens)[:, None] if tokens else values
        logits = model(values)
        return functional.cross_entropy(logits.mean(dim=1) if tokens else logits, labels, reduction="none")

    samples = zoo.make_samples("mlp", N)
    options = {"layers": "all", "sparsification": sparsification}
    plain, _ = FactoredGradients(build(False), loss, **options)(samples)
    found, _ = FactoredGradients(build(True), loss, compile=compile, **options)(samples)
    assert_equal(found, {layer: rows.double() for layer, rows in plain.items()})


def test_masks_of_two_sides():
    model, batch, loss = case("mlp")
    masks = {
        "hidden/output": Mask(torch.tensor([0, 3]), 5),
        "hidden/input": Mask(torch.tensor([1, 4, 6]), 7),
        "head/output": Mask(torch.tensor([0, 2]), 3),
        "head/input": Mask(torch.tensor([0, 1, 5]), 6),
    }
    found, _ = FactoredGradients(model, loss, sparsification="selective_mask-2*3", masks=masks)(batch)
    whole = expected("mlp", "identity", "identity", ["hidden", "head"])
    for layer, shape in (("hidden", (5, 7)), ("head", (3, 6))):
        rows, columns = masks[f"{layer}/output"].indices, masks[f"{layer}/input"].indices
        wanted = whole[layer].view(N, *shape)[:, rows][:, :, columns].flatten(1)
        torch.testing.assert_close(found[layer].double(), wanted, rtol=1e-4, atol=1e-6)


def test_matrices_drawn_elsewhere():
    model, batch, loss = case("mlp")
    generator = torch.Generator().manual_seed(3)
    shapes = {"hidden": (5, 7), "head": (3, 6)}
    matrices = {}
    for layer, (d_out, d_in) in shapes.items():
        matrices[f"{layer}/output"] = torch.randn(d_out, 2, generator=generator)
        matrices[f"{layer}/input"] = torch.randn(d_in, 3, generator=generator)
        matrices[layer] = torch.randn(6, 4, generator=generator)
    options = {"sparsification": "normal-2*3", "projection": "normal-4", "matrices": matrices}
    found, _ = FactoredGradients(model, loss, **options)(batch)
    whole = expected("mlp", "identity", "identity", ["hidden", "head"])
    for layer, shape in shapes.items():
        left, right = (matrices[f"{layer}/{side}"].double() for side in ("output", "input"))
        wanted = (left.mT @ whole[layer].view(N, *shape) @ right).flatten(1) @ matrices[layer].double()
        torch.testing.assert_close(found[layer].double(), wanted, rtol=1e-4, atol=1e-5)


def test_choice_of_layers():
    model = zoo.make_model("text")
    assert list(find_layers(model, "linear")) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert "head" in find_layers(model, "linear", include_head=True)
    assert list(find_layers(model, "blocks.1.*")) == ["blocks.1.norm", "blocks.1.up", "blocks.1.down"]
    assert list(find_layers(model, ["layernorm", "head"])) == ["norm", "head"]
    assert list(find_layers(model, lambda name, module: name == "embed")) == ["embed"]
    assert output_layer(model) == "head"
    assert not FactoredGradients(model, text_loss).include_head
    assert FactoredGradients(model, text_loss, include_head=True).include_head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "conv2d"}, "chooses no layer"),
        ({"layers": torch.nn.Linear}, "layers is the class Linear; expected one of linear, conv1d"),
        ({"layers": 7}, "layers is 7; expected one of linear"),
        ({"layers": ["linear", "nowhere.*"]}, "layers has 'nowhere.*', which no layer of the"),
        ({"layers": "normed"}, "BatchNorm1d"),
        ({"sparsification": "random_mask-16"}, "random_mask-16\\*16"),
        ({"sparsification": "selective_mask-2*2"}, "hidden/output"),
        ({"sparsification": "random_mask-2*2", "masks": {"x/output": Mask(torch.tensor([0]), 2)}}, "x/output"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"sparsification": "normal-2*2", "matrices": {"hidden/output": torch.ones(2, 5)}}, "expected \\(5, 2\\)"),
        ({"sparsification": "random_mask-2*2", "matrices": {"hidden/output": torch.ones(5, 2)}}, "hidden/output"),
        ({"sparsification": "normal-2*2", "matrices": {"hidden": torch.ones(4, 2)}}, "entries for hidden"),
        (
            {"sparsification": "normal-2*2", "projection": "sjlt-3", "matrices": {"hidden": torch.ones(4, 2)}},
            "expected \\(4, 3\\)",
        ),
    ],
)
def test_wrong_use_is_named(options, message):
    model = zoo.make_model("mlp")
    model.normed = nn.BatchNorm1d(3)
    with pytest.raises((UsageError, SpecError), match=message):
        FactoredGradients(model, cross_entropy, **options)


def test_wrong_outputs_and_shapes_are_named():
    model, batch, _ = case("mlp")
    with pytest.raises(UsageError, match="one value per sample"):
        FactoredGradients(model, lambda m, b: cross_entropy(m, b).mean())(batch)

    class Merged(zoo.MLP):
        def forward(self, x):
            return self.head(self.hidden(x).repeat(2, 1))[: len(x)]

    with pytest.raises(UsageError, match=r"layer 'head'.*samples on dimension 0"):
        FactoredGradients(Merged(), cross_entropy)(batch)


def test_seconds_are_counted():
    model, batch, loss = case("text")
    factored = FactoredGradients(model, loss, sparsification="normal-4*3", projection="sjlt-5")
    factored(batch)
    first = factored.timings
    assert first["compression"] > 0
    assert first["gradients"] > 0
    factored(batch)
    factored(batch)
    seconds = factored._clock.seconds
    assert all(seconds[name] > first[name] for name in first)
    # The first of three equal batches counts like the other two.
    assert factored.timings["compression"] == pytest.approx((seconds["compression"] - first["compression"]) * 3 / 2)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", ["text", "twice", "unused", "conv1d"])
def test_contractions_after_the_backward_pass_give_the_same(name, compile):
    model, batch, loss = case(name)
    factored = FactoredGradients(
        model, loss, layers="all", sparsification="random_mask-4*3", projection="sjlt-5", compile=compile
    )
    plain, _ = factored(batch, output=loss)
    with factored.attached():
        uses = factored._pass.single_uses(loss, batch, N)
        found, _ = factored.deferred_step(batch, N, uses)
    assert (
        len(uses) == {"text": 4, "twice": 1, "unused": 1, "conv1d": 1}[name]
    )  # heads stay whole, a shared layer has two
    assert_equal(found, {layer: rows.double() for layer, rows in plain.items()})


class ChangesInputs(nn.Module):
    """A layer's input is changed in place after the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        x.mul_(3)
        return self.head((x + y).sin())


def test_a_compiled_pass_sees_inputs_as_they_were():
    torch.manual_seed(0)
    model, batch = ChangesInputs(), (torch.randn(N, 5), torch.arange(N) % 4)
    options = {"sparsification": "random_mask-4*3", "layers": ["second"]}
    wanted, _ = FactoredGradients(model, cross_entropy, **options)(batch)
    factored = FactoredGradients(model, cross_entropy, compile=True, **options)
    with factored.attached():
        uses = factored._pass.single_uses(cross_entropy, batch, N)
        found, _ = factored.deferred_step(batch, N, uses)
    assert list(uses) == ["second"]
    assert_equal(found, {name: rows.double() for name, rows in wanted.items()})


def test_a_compiled_pass_keeps_the_type_of_inputs():
    model, batch, _ = case("mlp")

    def loss(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch).float()

    wanted, _ = FactoredGradients(model, loss, sparsification="random_mask-4*3")(batch)
    factored = FactoredGradients(model, loss, sparsification="random_mask-4*3", compile=True)
    with factored.attached():
        uses = factored._pass.single_uses(loss, batch, N)
        found, _ = factored.deferred_step(batch, N, uses)
    assert any((use.output, use.input) == (torch.bfloat16, torch.float32) for use in uses.values())
    for name, rows in wanted.items():
        assert torch.allclose(found[name], rows, rtol=1e-5, atol=1e-6), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("sparsification", "compile", "graph"),
    [
        *((spec, False, spec != "normal-4*3") for spec in STAGE1),
        ("random_mask-4*3", True, True),
        ("normal-4*3", True, None),
    ],
)
def test_a_gpu_gives_the_same(sparsification, compile, graph):
    model, batch, loss = case("text")
    model, batch = model.cuda(), tuple(part.cuda() for part in batch)
    factored = FactoredGradients(
        model, loss, layers="all", sparsification=sparsification, projection="sjlt-5", compile=compile, graph=graph
    )
    # The first call compiles and records, the second replays on other tokens.
    factored(tuple(part.flip(0) for part in batch))
    found, _ = factored(batch)
    assert_equal({k: v.cpu() for k, v in found.items()}, expected("text", sparsification, "sjlt-5", factored.layers))


class Attention(nn.Module):
    """PyTorch's attention, which uses the weight of its output projection without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


def test_layers_that_are_not_called_are_named(caplog):
    batch = torch.randn(N, 4, 8), torch.arange(N) % 3
    factored = FactoredGradients(Attention(), cross_entropy, layers="all")
    assert "leaves out weights of other kinds: attention.in_proj_weight, attention.in_proj_bias" in caplog.text
    for _ in range(2):
        rows, _ = factored(batch)
    assert not rows["attention.out_proj"].any()
    assert rows["head"].any()
    assert caplog.text.count("did not call get rows of zeros: attention.out_proj") == 1


def test_a_shared_weight_is_named(caplog):
    model, batch, loss = case("tied")
    FactoredGradients(model, loss, layers="all")(batch)
    assert "share a weight" in caplog.text
    caplog.clear()
    model, batch, loss = case("mlp")
    FactoredGradients(model, loss, layers="all")(batch)
    assert not caplog.text


def test_a_loss_without_a_gradient_is_refused():
    model, batch, loss = case("mlp")
    with pytest.raises(UsageError, match=r"no gradient.*hidden.*detached"):
        FactoredGradients(model, lambda *given: loss(*given).detach())(batch)
    # A pass that calls none of the layers gives zeros: which ones a batch needs may depend on the batch.
    rows, _ = FactoredGradients(model, lambda model, batch: batch[0].sum(dim=1))(batch)
    assert not any(part.any() for part in rows.values())


@pytest.mark.parametrize("sparsification", ["identity", "random_mask-4*40", "random_mask-4*5"])
@pytest.mark.parametrize("compile", [False, True])
def test_embeddings_of_one_id_a_sample(sparsification, compile):
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    ids, labels = torch.tensor([1, 7, 7, 19]), torch.tensor([0, 1, 2, 0])
    factored = FactoredGradients(
        model, cross_entropy, layers="embedding", sparsification=sparsification, compile=compile
    )
    rows, _ = factored((ids, labels))
    out, into = factored.sides("0")
    for i in range(4):
        value = cross_entropy(model, (ids[i : i + 1], labels[i : i + 1])).sum()
        (whole,) = torch.autograd.grad(value, [model[0].weight])
        wanted = out.dense().mT.float() @ whole.mT @ into.dense().float()
        torch.testing.assert_close(rows["0"][i], wanted.flatten())


def test_a_hook_that_makes_embeddings_require_gradients_does_no_harm():
    model, batch, loss = case("text")
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    wanted, _ = FactoredGradients(model, loss, layers="all")(batch)
    embedding.register_forward_hook(lambda module, args, y: y.requires_grad_(True))
    rows, _ = FactoredGradients(model, loss, layers="all")(batch)
    for name, part in wanted.items():
        torch.testing.assert_close(rows[name], part)


class Adapter(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)
        self.A = nn.Parameter(torch.randn(2, width))
        self.requires_grad_(False)
        self.A.requires_grad_(True)

    def forward(self, x):
        return super().forward(x) + x @ self.A.mT @ self.A


@pytest.mark.parametrize("layers", ["linear", "all", "*"])
def test_weights_that_are_left_out_frozen_or_derived_are_named(caplog, layers):
    derived = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6, bias=False))
    model = nn.Sequential(Adapter(6), derived, nn.Linear(6, 3))
    batch = torch.randn(N, 6), torch.arange(N) % 3
    rows, _ = FactoredGradients(model, cross_entropy, layers=layers)(batch)
    assert list(rows) == ["0", "1", "2"]
    assert ": 0.A" in caplog.text
    assert "parametrizations" not in caplog.text
    assert "frozen are captured like the others: 0" in caplog.text
    assert "parametrized weights are of the weights they result in: 1" in caplog.text
    weight = derived.weight.detach().requires_grad_()
    for i in range(N):
        y = model[2](functional.linear(model[0](batch[0][i : i + 1]), weight))
        (wanted,) = torch.autograd.grad(functional.cross_entropy(y, batch[1][i : i + 1]), [weight])
        torch.testing.assert_close(rows["1"][i], wanted.flatten())


def test_inference_mode_is_refused():
    model, batch, loss = case("mlp")
    with torch.inference_mode(), pytest.raises(UsageError, match=r"inference_mode.*outside of it"):
        FactoredGradients(model, loss)(batch)


def test_a_compression_that_makes_gradients_longer_is_named(caplog):
    model = zoo.make_model("mlp")
    shapes = FactoredGradients(model, cross_entropy).layers
    largest = max(shape.d_out * shape.d_in for shape in shapes.values())
    side = int(largest**0.5) + 1
    assert not caplog.text
    FactoredGradients(model, cross_entropy, sparsification=f"random_mask-{side}*{side}")
    assert not caplog.text
    FactoredGradients(model, cross_entropy, sparsification=f"normal-{side}*{side}")
    name, shape = next(iter(shapes.items()))
    assert f"{name} ({shape.d_out * shape.d_in:,} weights, {side * side:,} features)" in caplog.text
