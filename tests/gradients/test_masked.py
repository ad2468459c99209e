import itertools
import logging

import pytest
import torch
import zoo
from test_full import Snapshot, awkward_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, cross_entropy, margin
from grass_lib.gradients import pairs as pairs_module
from grass_lib.gradients.coordinates import split_coordinates
from grass_lib.gradients.masked_pass import groups_apart
from grass_lib.gradients.pairs import Pairs

N = 6


def text_output(model, batch):
    ids = batch[0]
    return model(ids).log_softmax(dim=2)[:, :-1].gather(2, ids[:, 1:, None]).sum(dim=(1, 2))


def squares(model, batch):
    return model(*batch).square().flatten(1).sum(dim=1)


def expected(model: nn.Module, output, batch, parts=None) -> torch.Tensor:
    """Float64, one plain backward pass per sample."""
    model = model.double().eval()
    wide = [value.double() if value.is_floating_point() else value for value in parts or batch]
    rebuild = (lambda values: dict(zip(batch, values, strict=True))) if isinstance(batch, dict) else tuple

    def value_of(used, index):
        return output(used, rebuild([value[index : index + 1] for value in wide]))[0]

    return zoo.loop_gradients(model, value_of, len(wide[-1]))


def some(p: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(p, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def agrees(model, samples, output=squares, *, shares=(1.0, 0.2), general=(), atol=1e-10):
    """Rows in float64 equal an independent computation, for all coordinates and for some of them."""
    model.double().train()
    reference = expected(model, output, samples)
    model.train()
    for share in shares:
        p = reference.shape[1]
        indices = some(p, max(1, int(share * p)))
        gradients = MaskedGradients(model, output, indices, dtype=torch.float64)
        rows, _ = gradients(None, samples)
        assert rows.shape == (len(samples[0]), len(indices))
        scale = float(reference.abs().max())
        torch.testing.assert_close(rows, reference[:, indices], atol=atol * scale, rtol=0)
        assert {name for name, route in gradients.routes.items() if route == "general"} == {
            name for name in general if name in gradients.routes
        }


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", sorted(zoo.MODELS | zoo.LAYERED))
def test_every_model_of_the_zoo_agrees_with_one_backward_pass_per_sample(name, share):
    samples = zoo.make_samples(name, N, dtype=torch.float64)
    batch = zoo.make_batch(name, samples)
    output = text_output if name == "text" else margin
    reference = expected(zoo.make_model(name), output, batch, samples)
    p = reference.shape[1]
    indices = some(p, max(1, int(share * p)))
    gradients = MaskedGradients(zoo.make_model(name, dtype=torch.float64), output, indices, dtype=torch.float64)
    rows, values = gradients(None, batch)
    torch.testing.assert_close(rows, reference[:, indices], atol=1e-12, rtol=1e-10)
    assert set(gradients.routes.values()) == {"layer"}
    full = PerSampleGradients(zoo.make_model(name, dtype=torch.float64), output, dtype=torch.float64)
    torch.testing.assert_close(values, full(None, batch)[1], atol=1e-12, rtol=1e-12)
    assert (gradients.p, gradients.names, gradients.k) == (full.p, full.names, len(indices))
    single = MaskedGradients(zoo.make_model(name), output, indices)
    narrow = zoo.make_batch(name, tuple(v.float() if v.is_floating_point() else v for v in samples))
    torch.testing.assert_close(single(None, narrow)[0].double(), reference[:, indices], atol=1e-5, rtol=1e-5)


CONVOLUTIONS = {
    "stride": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "rectangle": nn.Conv2d(4, 6, (3, 2), stride=(1, 3), padding=(0, 2), bias=False),
    "dilation": nn.Conv2d(4, 6, 3, dilation=(2, 1), padding="same"),
    "groups": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, stride=2, dilation=2, padding=2),
    "point": nn.Conv2d(4, 6, 1, stride=2),
    "reflect": nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    "circular": nn.Conv2d(4, 6, (2, 3), padding=1, padding_mode="circular", groups=2),
    "replicate": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", stride=2),
    "line": nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
    "volume": nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)),
}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions(name, dense, monkeypatch):
    monkeypatch.setattr(pairs_module, "DENSE_GAIN_CPU", 1e9 if dense else 0)
    shape = {"line": (11,), "volume": (3, 5, 4)}.get(name, (9, 8))
    x = torch.randn(N, 4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    agrees(nn.Sequential(CONVOLUTIONS[name], nn.Tanh()), (x,))


@pytest.mark.parametrize("scratch", [1, 50, 1 << 20])
@pytest.mark.parametrize("gain", [0, 1e9])
def test_pairs_in_any_chunks(gain, scratch, monkeypatch):
    monkeypatch.setattr(pairs_module, "DENSE_GAIN_CPU", gain)
    monkeypatch.setattr(pairs_module, "SCRATCH_CPU", scratch)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(5, size, 7, generator=generator, dtype=torch.float64) for size in (9, 12))
    flat = some(9 * 12, 30)
    pairs = Pairs(flat // 12, flat % 12, 9, 12, torch.device("cpu"))
    found = pairs.sums(left, right[:, pairs.columns])
    torch.testing.assert_close(found, (left @ right.mT).flatten(1)[:, flat], atol=1e-12, rtol=0)


class Tokens(nn.Module):
    """Linear layers and norms over tokens, an attention whose weights are used outside of layers' calls."""

    def __init__(self, norm: nn.Module, attention: bool = False) -> None:
        super().__init__()
        self.into = nn.Linear(6, 8)
        self.norm = norm
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if attention else None
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.norm(torch.tanh(self.into(x)))
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


class OverChannels(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, -1)).transpose(1, -1)


def spread(norm: nn.Module) -> nn.Module:
    """A norm away from its initial weights and running moments."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for value in itertools.chain(norm.parameters(), norm.buffers()):
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 2.0)
    return norm


NORMS = {
    "layer": nn.LayerNorm(8),
    "layer without bias": nn.LayerNorm(8, bias=False),
    "layer over two": nn.LayerNorm((5, 8)),
    "rms": nn.RMSNorm(8),
    "rms over two": nn.RMSNorm((5, 8), eps=1e-3),
    "group": OverChannels(nn.GroupNorm(2, 8)),
    "batch": OverChannels(nn.BatchNorm1d(8)),
}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_norms(name):
    x = torch.randn(N, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    agrees(Tokens(spread(NORMS[name])), (x,), shares=(1.0, 0.5, 0.05))


def test_batch_norm_over_images_and_affine_alone():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), spread(nn.BatchNorm2d(4)), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2))
    x = torch.randn(N, 2, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    agrees(model, (x,))
    reference = expected(model, squares, (x,))
    model.train()
    for indices in (torch.arange(76, 80), torch.arange(80, 84), torch.tensor([76, 83])):
        rows, _ = MaskedGradients(model, squares, indices, dtype=torch.float64)(None, (x,))
        torch.testing.assert_close(rows, reference[:, indices])


@pytest.mark.parametrize("scratch", [1, 1 << 20])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_embeddings_of_tokens_and_of_positions(padding_idx, scratch, monkeypatch):
    monkeypatch.setattr(pairs_module, "SCRATCH_CPU", scratch)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(9, 4, padding_idx=padding_idx)
            self.positions = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, ids):
            return self.head(torch.tanh(self.tokens(ids) + self.positions(torch.arange(5)[None])))

    ids = torch.randint(0, 9, (N, 5), generator=torch.Generator().manual_seed(1))
    agrees(Model(), (ids,), shares=(1.0, 0.5, 0.1))


def test_one_use_counts_once_and_two_uses_add_up():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.conv = nn.Linear(6, 6), nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x):
            x = self.conv(torch.tanh(self.conv(x)))
            return self.shared(torch.tanh(self.shared(x)))

    x = torch.randn(N, 1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    agrees(Model(), (x,))


class Odd(nn.Module):
    """A parameter of its own, a weight used outside of its layer, a layer without samples, a class of its own."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))
        self.first = nn.Linear(6, 4)
        self.table = nn.Linear(3, 4)
        self.doubled = self.Doubled(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(self.scale * x)) @ self.first.weight[:, :4] + self.table(torch.ones(1, 3).to(x)).sum(
            0
        )
        return self.head(torch.tanh(self.doubled(x)))


GENERAL = {"scale", "first.weight", "first.bias", "table.weight", "table.bias", "doubled.weight", "doubled.bias"}


def test_what_no_layer_serves_goes_the_general_way_and_is_named(caplog):
    x = torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with caplog.at_level(logging.WARNING, logger="grass_lib"):
        agrees(Odd(), (x,), general=GENERAL, shares=(1.0,))
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "'first.weight' is also used outside of its layer's call" in text
    assert "'table': its output (1, 4) has not the 6 samples" in text
    # Without coordinates of odd layers nothing is formed whole.
    p = PerSampleGradients(Odd(), squares).p
    gradients = MaskedGradients(Odd(), squares, torch.arange(p - 15, p))
    assert gradients.routes == {"head.weight": "layer", "head.bias": "layer"}
    assert gradients.general_weights == 0


def test_attention_keeps_its_own_weights_whole():
    x = torch.randn(N, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    model = Tokens(nn.LayerNorm(8), attention=True)
    agrees(model, (x,), general=[f"attention.{name}" for name in names])


class Mixing(nn.Module):
    """Samples of a batch influence each other: in the inputs, behind the first layer, or in a norm."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5, track_running_stats=False)

    def forward(self, x):
        x = x - 0.5 * x.mean(dim=0) if self.where == "inputs" else x
        x = torch.tanh(self.hidden(x))
        x = x - 0.5 * x.mean(dim=0) if self.where == "hidden" else x
        # A norm over the batch takes several positions, so that a batch of one has moments too.
        x = self.norm(torch.stack([x, x.square()], dim=2)).sum(dim=2) if self.where == "norm" else x
        return self.head(x)


@pytest.mark.parametrize("where", ["inputs", "hidden", "norm"])
def test_samples_that_influence_each_other_get_the_gradients_of_batches_of_one(where, caplog):
    torch.manual_seed(0)
    model, samples = Mixing(where).double(), zoo.make_samples("mlp", N, dtype=torch.float64)
    full, _ = PerSampleGradients(model, margin, dtype=torch.float64)(None, samples)
    indices = some(full.shape[1], 20)
    gradients = MaskedGradients(model, margin, indices, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="grass_lib"):
        rows, _ = gradients(None, samples)
    torch.testing.assert_close(rows, full[:, indices], atol=1e-12, rtol=0)
    assert set(gradients.routes.values()) == {"general"}
    assert "samples of a batch influence each other" in caplog.text


class Behind(nn.Module):
    """Samples influence each other behind a layer."""

    def __init__(self, mix) -> None:
        super().__init__()
        self.hidden, self.head, self.mix = nn.Linear(6, 5), nn.Linear(5, 3), mix

    def forward(self, x):
        return self.head(self.mix(self.hidden(x)))


MIXES = {
    "first": lambda h: h - h[:1].tanh() / 2,
    "last": lambda h: h - torch.cat([h[:1], (h[1:] + h[-1:].tanh())]),
    "before": lambda h: h.cumsum(dim=0),
    "neighbours": lambda h: h + torch.cat([h[:1] * 0, h[:-1].tanh()]),
    "largest": lambda h: h / h.abs().max(),
    "moments": lambda h: nn.functional.batch_norm(torch.stack([h, h.square()], dim=2), None, None, training=True)[
        ..., 0
    ],
}


@pytest.mark.parametrize("ignored", [(), (0,), (0, 1, 2, 4), range(6)])
@pytest.mark.parametrize("mix", sorted(MIXES))
def test_samples_that_mix_are_found_whichever_of_them_has_a_gradient(mix, ignored):
    torch.manual_seed(0)
    model, (x, y) = Behind(MIXES[mix]).double(), zoo.make_samples("mlp", N, dtype=torch.float64)
    gradients = MaskedGradients(model, cross_entropy, torch.arange(53), dtype=torch.float64)
    labels = y.clone()
    labels[list(ignored)] = -100
    for batch in ((x, labels), (x.flip(0), y)):
        rows, _ = gradients(None, batch)
        full, _ = PerSampleGradients(model, cross_entropy, dtype=torch.float64)(None, batch)
        torch.testing.assert_close(rows, full, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("n", "count"), [(1, 1), (2, 2), (3, 3), (6, 4), (7, 5), (20, 6), (70, 8), (71, 9)])
def test_groups_keep_every_two_samples_apart(n, count):
    groups = groups_apart(n)
    assert groups.shape == (count, n)
    assert bool(groups.any(dim=1).all())
    apart = (groups[:, :, None] & ~groups[:, None, :]).any(dim=0)
    assert bool((apart | torch.eye(n, dtype=torch.bool)).all())


def test_a_batch_is_checked_until_two_samples_have_a_gradient(monkeypatch):
    checks, gradients = [], MaskedGradients(zoo.make_model("mlp"), cross_entropy, torch.arange(53))
    run = gradients._pass

    def noting(*args, check):
        checks.append(check)
        return run(*args, check=check)

    monkeypatch.setattr(gradients, "_pass", noting)
    x, y = zoo.make_samples("mlp", N)
    for alive in (0, 1, 2, 2):
        gradients(None, (x, torch.where(torch.arange(N) < alive, y, -100)))
    assert checks == [True, True, True, False]


@pytest.mark.parametrize("layer", [nn.Linear(6, 8), nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))])
def test_an_activation_may_work_in_place_behind_a_layer_over_tokens(layer):
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Sigmoid(), nn.Flatten(1), nn.Linear(32, 3))
    x = torch.randn(N, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    agrees(model, (x,))
    model.double()
    gradients = MaskedGradients(model, squares, torch.arange(50), dtype=torch.float64)
    first, _ = gradients(None, (x,))
    assert torch.equal(gradients(None, (x,))[0], first)  # without the checks of the first batch


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize("model", [zoo.make_model("unused"), Odd()])
def test_values_without_a_gradient_are_refused(model, share):
    p = sum(value.numel() for value in model.parameters())
    samples = (torch.randn(N, 6), torch.zeros(N, dtype=torch.int64))
    gradients = MaskedGradients(
        model, lambda used, batch: margin(used, batch).detach(), some(p, max(1, int(share * p)))
    )
    with pytest.raises(UsageError, match="no gradient with respect to any trainable weight"):
        gradients(None, samples)


def test_weights_without_a_gradient_give_zeros():
    model, samples = zoo.make_model("unused"), zoo.make_samples("unused", N)
    p = sum(value.numel() for value in model.parameters())
    for _ in range(2):
        assert torch.count_nonzero(MaskedGradients(model, margin, torch.arange(p - 6, p))(None, samples)[0]) == 0
    rows, _ = MaskedGradients(model, cross_entropy, torch.arange(p))(None, (samples[0], torch.full((N,), -100)))
    assert torch.count_nonzero(rows) == 0


def test_messages_do_not_advise_the_mask_that_there_is():
    def reading(used, batch):
        return squares(used, batch) * batch[0].max().item()

    gradients = MaskedGradients(Odd(), reading, torch.arange(6))
    with pytest.raises(UsageError, match=r"Odd or its output looks at the values of a tensor") as caught:
        gradients(None, (torch.randn(N, 6),))
    assert "random_mask" not in str(caught.value)


def test_an_output_of_another_shape_is_refused_without_a_warning_or_served_with_one(caplog):
    samples = zoo.make_samples("mlp", N)
    with caplog.at_level(logging.WARNING, logger="grass_lib"):
        for output in (lambda *given: margin(*given).mean(), lambda *given: margin(*given)[:, None]):
            with pytest.raises(UsageError, match="one value per sample"):
                MaskedGradients(zoo.make_model("mlp"), output, some(50, 10))(None, samples)
        assert not caplog.records
        averaged = MaskedGradients(zoo.make_model("mlp"), lambda *given: margin(*given).mean()[None], some(50, 10))
        rows, _ = averaged(None, samples)
    assert "the output has not one value each" in caplog.text
    full, _ = PerSampleGradients(zoo.make_model("mlp"), margin)(None, samples)
    torch.testing.assert_close(rows, full[:, some(50, 10)], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 100])
def test_micro_batches_and_batch_mates_change_nothing(micro_batch):
    samples = zoo.make_samples("image", N)
    indices = some(200, 50)
    whole, values = MaskedGradients(zoo.make_model("image"), margin, indices)(None, samples)
    gradients = MaskedGradients(zoo.make_model("image"), margin, indices, micro_batch=micro_batch)
    rows, found = gradients(None, samples)
    torch.testing.assert_close(rows, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, values, atol=1e-6, rtol=1e-5)
    assert gradients.model_calls == -(-N // micro_batch)
    alone, _ = gradients(None, tuple(value[2:3] for value in samples))
    torch.testing.assert_close(alone, whole[2:3], atol=1e-6, rtol=1e-5)


def test_one_pass_serves_several_masks_and_masks_may_change():
    samples = zoo.make_samples("image", N)
    full, _ = PerSampleGradients(zoo.make_model("image"), margin)(None, samples)
    masks = [some(full.shape[1], k, seed) for seed, k in enumerate((10, 60, 150))]
    union = torch.cat(masks).unique()
    gradients = MaskedGradients(zoo.make_model("image"), margin, union)
    rows, _ = gradients(None, samples)
    for mask in masks:
        place = torch.searchsorted(union, mask)
        torch.testing.assert_close(rows[:, place], full[:, mask], atol=1e-6, rtol=1e-5)
        other = gradients.keeping(mask)
        torch.testing.assert_close(other(None, samples)[0], full[:, mask], atol=1e-6, rtol=1e-5)
    assert gradients.model_calls == 4


def test_a_checkpoint_replaces_weights_and_running_moments():
    other = zoo.make_model("normed", seed=7)
    samples = zoo.make_samples("normed", N)
    full, _ = PerSampleGradients(other, margin)(None, samples)
    indices = some(full.shape[1], 30)
    gradients = MaskedGradients(zoo.make_model("normed"), margin, indices)
    for state in (other.state_dict(), gradients.bind(other.state_dict())):
        torch.testing.assert_close(gradients(state, samples)[0], full[:, indices], atol=1e-6, rtol=1e-5)
    with pytest.raises(UsageError, match="does not fit the model"):
        gradients(zoo.make_model("tied").state_dict(), samples)


@pytest.mark.parametrize("fails", [None, 1, 2])
def test_the_model_is_left_as_found(fails):
    class Fails(zoo.Normed):
        calls = 0

        def forward(self, x):
            out = super().forward(x)
            Fails.calls += 1
            if Fails.calls == fails:
                raise ArithmeticError("in the middle")
            return out

    Fails.calls = 0
    model = Fails()
    model.dropout.eval()
    model.hidden.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, rng = Snapshot(model), torch.random.get_rng_state()
    gradients = MaskedGradients(model, margin, some(40, 20), micro_batch=2)
    state, samples = zoo.make_model("normed", seed=5).state_dict(), zoo.make_samples("normed", N)
    if fails is None:
        gradients(state, samples)
    else:
        with pytest.raises(ArithmeticError):
            gradients(state, samples)
    before.check()
    assert torch.equal(torch.random.get_rng_state(), rng)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_of_others_run_after_ours():
    model = zoo.make_model("mlp", dtype=torch.float64)
    model.hidden.register_forward_hook(lambda module, args, y: 3 * y)
    samples = zoo.make_samples("mlp", N, dtype=torch.float64)
    agrees(model, samples, output=margin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_added_in_float32(dtype):
    """The sum over 4,096 tokens of ones times ones is exact in float32 and would stop at 256 or 2,048."""
    model = nn.Linear(3, 2).to(dtype)
    x = torch.ones(1, 4096, 3, dtype=dtype)
    rows, _ = MaskedGradients(model, lambda used, batch: used(batch[0]).float().sum(dim=(1, 2)), some(8, 8))(None, (x,))
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.full((1, 8), 4096.0))


def test_samples_with_a_kept_coordinate_that_is_not_finite_are_named():
    x, y = zoo.make_samples("mlp", N)
    x[4, 0] = torch.nan
    with pytest.raises(GrassError, match=r"1 sample\(s\) is not finite, at position\(s\) 104;"):
        MaskedGradients(zoo.make_model("mlp"), margin, some(50, 10))(None, (x, y), first=100)


def test_rows_are_written_where_asked():
    samples = zoo.make_samples("mlp", N)
    gradients = MaskedGradients(zoo.make_model("mlp"), margin, some(50, 10))
    wanted, _ = gradients(None, samples)
    buffer = torch.full((N + 4, 10), 7.0)
    gradients(None, samples, out=buffer[2 : N + 2])
    assert torch.equal(buffer[2 : N + 2], wanted)
    assert bool((buffer[:2] == 7).all())
    assert bool((buffer[N + 2 :] == 7).all())
    with pytest.raises(UsageError, match="out is"):
        gradients(None, samples, out=buffer)
    assert gradients(None, zoo.make_samples("mlp", 0))[0].shape == (0, 10)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 53]), "run from 0 to 53; expected 0 to 52"),
        (torch.tensor([-1, 3]), "run from -1 to 3"),
        (torch.tensor([4, 2]), "4 is followed by 2 at position 0"),
        (torch.tensor([1, 2, 2]), "2 is followed by 2 at position 1"),
        (torch.tensor([], dtype=torch.int64), "indices are empty"),
        (torch.tensor([1, 2], dtype=torch.int32), "torch.int32"),
        (torch.zeros(2, 2, dtype=torch.int64), "shape"),
        ([1, 2], "list"),
    ],
)
def test_bad_indices_are_refused(indices, message):
    assert PerSampleGradients(zoo.make_model("mlp"), margin).p == 53
    with pytest.raises(UsageError, match=message):
        MaskedGradients(zoo.make_model("mlp"), margin, indices)


def test_bad_arguments_are_refused():
    model, indices = awkward_model("mlp"), some(40, 5)
    with pytest.raises(UsageError, match="micro_batch is 0"):
        MaskedGradients(model, margin, indices, micro_batch=0)
    with pytest.raises(UsageError, match="float16"):
        MaskedGradients(model, margin, indices, dtype=torch.float16)
    with pytest.raises(UsageError, match="expected 'torch' or 'kernel'"):
        MaskedGradients(model, margin, indices, backend="triton")
    with pytest.raises(UsageError, match="needs a CUDA GPU"):
        MaskedGradients(model, margin, indices, backend="kernel", device="cpu")
    averaged = MaskedGradients(model, lambda used, batch: margin(used, batch).mean(), indices)
    with pytest.raises(UsageError, match="one value per sample"):
        averaged(None, zoo.make_samples("mlp", 4))


def test_coordinates_are_taken_apart_by_parameter():
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([4]), "c": torch.Size([5])}
    parts = split_coordinates(torch.tensor([0, 5, 10, 14]), shapes)
    assert {name: (part.local.tolist(), part.columns) for name, part in parts.items()} == {
        "a": ([0, 5], slice(0, 2)),
        "c": ([0, 4], slice(2, 4)),
    }


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return out


def test_no_tensor_is_as_large_as_the_full_gradients(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, stride=2), nn.Flatten())
    model.append(nn.Linear(64 * 9, 100))
    n, samples = 32, (torch.randn(32, 3, 8, 8), torch.arange(32))
    p = sum(parameter.numel() for parameter in model.parameters())
    indices = some(p, p // 200)
    monkeypatch.setattr(pairs_module, "SCRATCH_CPU", 1 << 12)
    gradients = MaskedGradients(model, margin, indices)
    with Largest() as ours:
        rows, _ = gradients(None, samples)
    with Largest() as theirs:
        full, _ = PerSampleGradients(model, margin)(None, samples)
    torch.testing.assert_close(rows, full[:, indices], atol=1e-6, rtol=1e-4)
    assert theirs.bytes >= 4 * n * p
    activations = 4 * n * 48 * 10 * 10  # the padded input of the second layer would be the largest
    assert ours.bytes <= activations
    assert 20 * ours.bytes < theirs.bytes


def test_a_later_batch_without_labels_gives_zeros():
    model = nn.Linear(4, 3)

    def loss(model, batch):
        x, y = batch
        return cross_entropy(model, batch) if bool((y >= 0).all()) else torch.zeros(len(x))

    masked = MaskedGradients(model, loss, torch.arange(5))
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert masked(None, (x, y))[0].any()
    assert not masked(None, (x, -y - 1))[0].any()
    with pytest.raises(UsageError, match="no gradient"):
        MaskedGradients(model, loss, torch.arange(5))(None, (x, -y - 1))
