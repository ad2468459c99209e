"""Masks for linear layers, against explicit gradients in float64 and on planted signals."""

import pytest
import torch
import zoo
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.gradients import FactoredGradients, cross_entropy
from grass_lib.masks import fit_factored
from grass_lib.masks.factored import choose, energy_sides, held_out_correlation
from grass_lib.masks.layer_samples import collect
from grass_lib.masks.low_rank import low_rank
from grass_lib.masks.token_pairs import Factors, correlation_gain, inner_products

N = 40


def text_loss(model, batch):
    (ids,) = batch
    following = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = functional.cross_entropy(model(ids).flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(ids.shape).sum(dim=1)


def case(name, dtype=torch.float64):
    model = zoo.make_model(name, dtype=dtype)
    return model, text_loss if name == "text" else cross_entropy, zoo.make_samples(name, N, dtype=dtype)


def explicit(model, loss, samples):
    """Every sample's gradients of linear layers ``{name: (N, d_out, d_in)}``, the bias as the last column."""
    model.eval()
    rows = {}
    for index in range(N):
        model.zero_grad()
        loss(model, tuple(part[index : index + 1] for part in samples)).sum().backward()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                weight = module.weight.grad.mT if type(module).__name__ == "Conv1D" else module.weight.grad
                bias = [] if module.bias is None else [module.bias.grad[:, None]]
                rows.setdefault(name, []).append(torch.cat([weight, *bias], dim=1).clone())
    return {name: torch.stack(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("name", ["mlp", "frozen", "twice", "text", "conv1d"])
def test_energies_and_inner_products_are_those_of_explicit_gradients(name):
    model, loss, samples = case(name)
    found, n = collect(model, loss, zoo.make_loader(samples, 7), include_head=True, progress=False)
    assert n == N
    model.requires_grad_(True)
    wanted = explicit(model, loss, samples)
    assert set(found) == set(wanted)
    for layer, full in wanted.items():
        squares = full.square().sum(dim=0)
        torch.testing.assert_close(found[layer].energy[0], squares.sum(dim=1))
        torch.testing.assert_close(found[layer].energy[1], squares.sum(dim=0))
        flat = full.flatten(1)
        products = flat @ flat.mT
        seen = sorted(torch.cat([found[layer].fit.full.diagonal(), found[layer].held_out.full.diagonal()]).tolist())
        scale = seen[-1] / float(products.diagonal().max())
        torch.testing.assert_close(torch.tensor(seen, dtype=torch.float64), products.diagonal().sort().values * scale)
        assert found[layer].kept_energy == pytest.approx(1.0)


def test_products_of_factors_and_their_gain():
    generator = torch.Generator().manual_seed(0)

    def draw(n, r):
        return [torch.randn(n, r, d, generator=generator, dtype=torch.float64) for d in (6, 5)]

    a, b = Factors(*draw(4, 3)), Factors(*draw(7, 2))
    whole = [(side.left.mT @ side.right) for side in (a, b)]
    torch.testing.assert_close(inner_products(a, b), whole[0].flatten(1) @ whole[1].flatten(1).mT)
    weights = [torch.rand(d, generator=generator, dtype=torch.float64).requires_grad_() for d in (6, 5)]
    full = inner_products(a, b)
    masked = (whole[0] * weights[0][:, None] * weights[1]).flatten(1) @ whole[1].flatten(1).mT
    pairs = torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(full, masked, strict=True)])
    wanted = torch.autograd.grad(pairs.mean(), weights)
    found = correlation_gain(a, b, full, tuple(weight.detach() for weight in weights))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_held_out_correlation_leaves_out_self_pairs():
    model, loss, samples = case("text")
    found, _ = collect(model, loss, zoo.make_loader(samples), progress=False)
    layer = found["blocks.0.up"]
    chosen = energy_sides(layer, (3, 2))
    held = layer.held_out.samples
    whole = held.left.mT @ held.right
    kept = whole[:, chosen[0]][:, :, chosen[1]].flatten(1)
    full, masked = whole.flatten(1) @ whole.flatten(1).mT, kept @ kept.mT
    off = ~torch.eye(held.n, dtype=torch.bool)
    wanted = [spearmanr(full[i][off[i]], masked[i][off[i]]).statistic for i in range(held.n)]
    assert held_out_correlation(layer, chosen) == pytest.approx(sum(wanted) / len(wanted))


def test_low_rank_factors_lose_nothing_of_a_low_rank_and_little_of_the_largest_part():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    mix = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    delta = mix @ torch.randn(2, 4, 20, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 50, 30, generator=generator, dtype=torch.float64)
    left, right = low_rank(delta, x, 8, start)
    assert left.shape == (2, 8, 20)
    torch.testing.assert_close(left.mT @ right, delta.mT @ x)
    noisy = delta + 0.05 * torch.randn(2, 50, 20, generator=generator, dtype=torch.float64)
    left, right = low_rank(noisy, x, 8, start)
    whole = noisy.mT @ x
    error = (left.mT @ right - whole).square().sum(dim=(1, 2))
    best = torch.linalg.svdvals(whole)[:, 8:].square().sum(dim=1)
    assert bool((error <= 1.5 * best).all())


class Planted(nn.Module):
    """One layer whose output gradients and inputs are what the samples say."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(80, 60, bias=False)

    def forward(self, x, delta):
        return (self.layer(x) * delta).flatten(1).sum(dim=1)


SIGNAL = {"layer/output": torch.arange(3, 60, 10), "layer/input": torch.arange(5, 80, 13)}


def planted_loss(model, batch):
    return model(*batch)


def draw(n, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, tokens, d, generator=generator) for d in (80, 60)], generator


@pytest.mark.parametrize("method", ["energy", "learned"])
def test_planted_energy_is_found(method):
    samples, _ = draw(120, 5)
    for side, name in zip(samples, ("layer/input", "layer/output"), strict=True):
        side[:, :, SIGNAL[name]] *= 5.0
    loader = zoo.make_loader(tuple(samples), 32)
    masks = fit_factored(Planted(), planted_loss, loader, k=(6, 6), method=method, progress=False)
    for name, signal in SIGNAL.items():
        assert masks[name].indices.tolist() == signal.tolist()


def test_planted_structure_is_found_where_energy_says_nothing():
    # All coordinates have variance 1; those of the signal share a factor on each side, which makes 70 % of them.
    samples, generator = draw(400, 1)
    for side, name in zip(samples, ("layer/input", "layer/output"), strict=True):
        signs = torch.randint(0, 2, (6,), generator=generator) * 2.0 - 1.0
        factor = torch.randint(0, 2, (400, 1, 1), generator=generator) * 2.0 - 1.0
        side[:, :, SIGNAL[name]] = 0.7**0.5 * factor * signs + 0.3**0.5 * side[:, :, SIGNAL[name]]
    found, n = collect(Planted(), planted_loss, zoo.make_loader(tuple(samples), 32), samples=400, progress=False)
    masks = {method: choose(found, n, (6, 6), method=method, progress=False) for method in ("energy", "learned")}
    reached = {
        method: held_out_correlation(found["layer"], tuple(mask.indices for mask in chosen.values()))
        for method, chosen in masks.items()
    }
    planted = held_out_correlation(found["layer"], tuple(SIGNAL.values()))
    assert reached["learned"] >= planted - 0.03
    assert reached["learned"] >= reached["energy"] + 0.1
    facts = masks["learned"]["layer/output"].provenance
    assert float(facts["held_out_correlation"]) == pytest.approx(reached["learned"], abs=1e-6)
    assert float(facts["energy_correlation"]) == pytest.approx(reached["energy"], abs=1e-6)
    for name, signal in SIGNAL.items():
        shares = {method: set(chosen[name].indices.tolist()) & set(signal.tolist()) for method, chosen in masks.items()}
        assert len(shares["learned"]) >= 4
        assert len(shares["energy"]) <= 2


@pytest.mark.parametrize("method", ["energy", "learned"])
def test_the_same_masks_for_any_batch_size(method):
    model, loss, samples = case("text")
    one, other = (
        fit_factored(model, loss, zoo.make_loader(samples, size), k=(3, 3), method=method, seed=2, progress=False)
        for size in (1, 16)
    )
    assert list(one) == list(other)
    for name, mask in one.items():
        assert torch.equal(mask.indices, other[name].indices)


def test_random_masks_are_those_of_random_mask():
    model, loss, samples = case("mlp", torch.float32)
    masks = fit_factored(model, loss, zoo.make_loader(samples), k=(2, 4), method="random", seed=5, progress=False)
    gradients = FactoredGradients(model, loss, sparsification="random_mask-2*4", seed=5)
    for name in gradients.layers:
        for side, key in zip(gradients.sides(name), (f"{name}/output", f"{name}/input"), strict=True):
            assert torch.equal(side.index, masks[key].indices)


@pytest.mark.parametrize("name", ["mlp", "text", "conv1d"])
@pytest.mark.parametrize("k", [(3, 4), (3, 1000)])
def test_factored_gradients_keep_exactly_the_masks_entries(name, k):
    model, loss, samples = case(name)
    masks = fit_factored(model, loss, zoo.make_loader(samples), k=k, method="energy", progress=False)
    gradients = FactoredGradients(
        model, loss, sparsification=f"selective_mask-{k[0]}*{k[1]}", masks=masks, dtype=torch.float64
    )
    rows, _ = gradients(samples)
    model.requires_grad_(True)
    for layer, full in explicit(model, loss, samples).items():
        if layer in rows:
            kept = full[:, masks[f"{layer}/output"].indices][:, :, masks[f"{layer}/input"].indices]
            torch.testing.assert_close(rows[layer], kept.flatten(1))


def test_queries_of_their_own():
    model, loss, samples = case("text")
    queries = zoo.make_loader(zoo.make_samples("text", 24, seed=9, dtype=torch.float64))
    found, _ = collect(model, loss, zoo.make_loader(samples), queries=queries, progress=False)
    layer = found["blocks.1.up"]
    assert layer.fit.full.shape == (18, 30)
    assert layer.held_out.full.shape == (6, 10)
    masks = fit_factored(model, loss, zoo.make_loader(samples), k=(3, 3), queries=queries, progress=False)
    facts = masks["blocks.1.up/input"].provenance
    assert float(facts["held_out_correlation"]) >= float(facts["energy_correlation"]) - 0.005


def test_the_recipe_of_the_paper_runs():
    model, loss, samples = case("mlp")
    masks = fit_factored(model, loss, zoo.make_loader(samples), k=(2, 2), recipe="paper", progress=False)
    assert int(masks["hidden/input"].provenance["steps"]) >= 500


def test_the_model_is_left_as_it_was_found():
    model, loss, samples = case("frozen")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]

    def broken(model, batch):
        model(batch[0])
        raise RuntimeError("on the way")

    fit_factored(model, loss, zoo.make_loader(samples), k=(2, 2), method="energy", progress=False)
    with pytest.raises(RuntimeError, match="on the way"):
        fit_factored(model, broken, zoo.make_loader(samples), k=(2, 2), method="energy", progress=False)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"method": "leverage"}, "random, energy, learned"),
        ({"k": (0, 3)}, "at least 1"),
        ({"k": (3,)}, "k_out"),
        ({"method": "energy", "rank": 3}, "rank"),
        ({"samples": 3}, "at least 20"),
        ({"recipe": "papers"}, "recipe"),
        ({"layers": "all"}, "embedding"),
        ({"cache_bytes": 10}, "cache_bytes"),
        ({"provenance": {"seed": "3"}}, "seed"),
    ],
)
def test_wrong_words_are_named(words, message):
    model, loss, samples = case("text", torch.float32)
    with pytest.raises(UsageError, match=message):
        fit_factored(model, loss, zoo.make_loader(samples), **{"k": (2, 2), "progress": False, **words})


def test_bad_gradients_are_named():
    model, loss, samples = case("mlp", torch.float32)

    def bad(model, batch):
        return loss(model, batch) * torch.where(batch[0][:, 0] == samples[0][9, 0], torch.nan, 1.0)

    with pytest.raises(UsageError, match=r"sample\(s\) 9 "):
        fit_factored(model, bad, zoo.make_loader(samples), k=(2, 2), progress=False)
    with pytest.raises(UsageError, match="zero"):
        fit_factored(model, lambda m, b: loss(m, b) * 0.0, zoo.make_loader(samples), k=(2, 2), progress=False)
    unused, loss, samples = case("unused", torch.float32)
    with pytest.raises(UsageError, match="'spare' are zero"):
        fit_factored(unused, loss, zoo.make_loader(samples), k=(2, 2), method="energy", progress=False)
    few = zoo.make_loader(tuple(part[:1] for part in samples))
    with pytest.raises(UsageError, match="1 samples"):
        fit_factored(model, loss, few, k=(2, 2), method="energy", progress=False)
    with pytest.raises(UsageError, match="per sample"):
        fit_factored(model, lambda m, b: loss(m, b).mean(), zoo.make_loader(samples), k=(2, 2), progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_same_energies_and_masks_on_a_gpu():
    model, loss, samples = case("text")
    on_cpu, _ = collect(model, loss, zoo.make_loader(samples), rank=3, progress=False)
    on_gpu, _ = collect(model.cuda(), loss, zoo.make_loader(samples), rank=3, progress=False)
    for name, layer in on_cpu.items():
        for mine, theirs in zip(layer.energy, on_gpu[name].energy, strict=True):
            torch.testing.assert_close(mine, theirs)
        assert on_gpu[name].kept_energy == pytest.approx(layer.kept_energy)
    one, other = (choose(found, N, (3, 3), method="learned", progress=False) for found in (on_cpu, on_gpu))
    assert all(torch.equal(mask.indices, other[name].indices) for name, mask in one.items())
