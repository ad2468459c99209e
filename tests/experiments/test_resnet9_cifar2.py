from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from grass_lib import TRAK
from grass_lib.errors import BankError, DataError, SpecError, UsageError
from grass_lib.evaluation import RetrainingBank, lds
from grass_lib.evaluation.plan import Member
from grass_lib.experiments import EXPERIMENTS, mlp_mnist, resnet9_cifar2
from grass_lib.experiments.data import elpv
from grass_lib.experiments.data.cifar2 import Photos
from grass_lib.experiments.models.resnet9 import ResNet9, ResNet9Sizes, initial_state, load_state, state_of
from grass_lib.experiments.resnet9_masks import fit_masks
from grass_lib.experiments.resnet9_protocol import RECIPES
from grass_lib.experiments.resnet9_trainer import GroupTrainer, ImageRecipe
from grass_lib.experiments.sgd_step import SGDStep
from grass_lib.gradients import PerSampleGradients, margin
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec

SMALL = ResNet9Sizes(width=2, stem_stride=4)
RECIPE = ImageRecipe(lr=0.05, epochs=2, batch_size=6, warm_up=0.3)
TINY = replace(
    resnet9_cifar2.protocol("embedded", n_lds=4, n_trak=2, masks="energy"),
    sizes=SMALL,
    recipe=RECIPE,
    group_size=3,
    fit_rows=24,
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
    ),
]


@pytest.fixture(scope="module")
def photos() -> Photos:
    """A few pictures with a little of their class in them, so that training takes no time."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    images = torch.randint(0, 200, (40, 32, 32, 3), generator=generator) + 50 * y[:, None, None, None]
    x = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    images = images.to(torch.uint8)
    return Photos(
        *(x[:30], y[:30], x[30:], y[30:], images[:30], images[30:]),
        *(("cat", "dog"), "test", "nobody", "embedded", 40, "0" * 64),
    )


def bank_in(folder, role):
    """The only bank of a role below a folder."""
    (found,) = folder.glob(f"{role}-*")
    return RetrainingBank.load(found)


def test_the_model_has_the_papers_size_and_shape():
    assert ResNet9Sizes().parameters == 4_825_154
    with torch.device("meta"):
        model = ResNet9()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 2)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 10
    assert all(module.bias is None for module in convolutions)
    assert resnet9_cifar2.protocol("embedded").sizes.parameters < 100_000
    with pytest.raises(UsageError, match="expected whole numbers"):
        ResNet9Sizes(width=0)


def test_a_block_is_rectified_before_the_sum():
    model = ResNet9(SMALL).eval()
    block = model.block1
    x = torch.randn(3, 2, 8, 8)
    inner = block.norm2(block.conv2(functional.relu(block.norm1(block.conv1(x))))).clamp(min=0)
    expected = (inner + block.shortcut_norm(block.shortcut(x))).clamp(min=0)
    torch.testing.assert_close(block(x), expected)


def test_initial_weights_are_distributed_as_pytorch_draws_them():
    sizes = ResNet9Sizes(width=16)
    state = initial_state(sizes, Stream(0, "a", "init"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = ResNet9(sizes).state_dict()
    assert list(state) == list(reference)
    for name, value in reference.items():
        assert state[name].shape == value.shape
        assert state[name].dtype == value.dtype
        if value.dim() > 1:
            bound = value[0].numel() ** -0.5
            assert state[name].abs().max() <= bound
            if value.numel() > 200:
                assert state[name].std() == pytest.approx(bound / 3**0.5, rel=0.1)
        elif not name.startswith("head"):
            assert torch.equal(state[name], value)
    assert not torch.equal(state["stem.weight"], initial_state(sizes, Stream(1, "a", "init"))["stem.weight"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_initial_weights_are_the_same_bits_on_a_gpu():
    here, there = (initial_state(ResNet9Sizes(width=8), Stream(0, "a", "init"), device) for device in ("cpu", "cuda"))
    assert all(torch.equal(value, there[name].cpu()) for name, value in here.items())


def test_states_are_copied_in_place_and_checked():
    model = ResNet9(SMALL)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    state = initial_state(SMALL, Stream(0, "b", "init"))
    load_state(model, state)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before
    assert all(torch.equal(value, state[name]) for name, value in state_of(model).items())
    with pytest.raises(DataError, match=r"head\.bias missing"):
        load_state(model, {name: value for name, value in state.items() if name != "head.bias"})
    with pytest.raises(DataError, match="another shape"):
        load_state(model, initial_state(ResNet9Sizes(width=3), Stream(0, "b", "init")))


def test_rates():
    assert ImageRecipe(lr=0.01).rates(3) == [0.01] * 3
    rates = ImageRecipe(lr=0.05, warm_up=0.3).rates(1000)
    assert max(rates) == pytest.approx(0.05, rel=0.01)
    assert rates.index(max(rates)) in range(298, 302)
    assert 0 < rates[0] < 0.001
    assert 0 < rates[-1] < 0.001
    assert rates[:300] == sorted(rates[:300])
    assert rates[301:] == sorted(rates[301:], reverse=True)
    assert all(rate > 0 for rate in ImageRecipe(warm_up=0.9).rates(1))


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"epochs": 0}, {"momentum": 1.0}, {"warm_up": 1.0}, {"batch_size": 0}])
def test_bad_recipes(change):
    with pytest.raises(UsageError, match="expected"):
        ImageRecipe(**change)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_are_those_of_sgd_also_when_recorded(device, photos):
    """On a GPU the recorded steps, for both sizes of batches; on a CPU the same kernels one by one."""
    x, y = photos.train_x.to(device), photos.train_y.to(device)
    model, other = ResNet9(SMALL).to(device).train(), ResNet9(SMALL).to(device).train()
    step = SGDStep(model, momentum=0.9)
    step.record(x, y, (8, 3))
    assert sorted(step._recorded) == ([3, 8] if device == "cuda" else [])
    rates = [0.02, 0.05, 0.01, 0.03, 0.02]
    for turn in range(2):
        start = initial_state(SMALL, Stream(turn, "c", "init"))
        load_state(model, start)
        step.restart()
        load_state(other, start)
        optimizer = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
        for size, rate in zip((8, 3, 8, 5, 8), rates, strict=True):
            rows = slice(turn, turn + size)
            step(x[rows], y[rows], rate)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            functional.cross_entropy(other(x[rows]), y[rows]).backward()
            optimizer.step()
        expected = other.state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_depends_on_its_streams_alone(device, photos):
    trainer = GroupTrainer(photos, RECIPE, SMALL, device=device)
    members = [Member(0, "lds", index) for index in range(3)]
    subsets = torch.stack([torch.arange(index, 15 + index) for index in range(3)])
    together = trainer(subsets, members)
    assert together.outputs.shape == (3, 10)
    again = GroupTrainer(photos, RECIPE, SMALL, device=device)(subsets[2:], members[2:])
    assert torch.equal(again.outputs[0], together.outputs[2])
    assert all(torch.equal(value, together.state_dicts[2][name]) for name, value in again.state_dicts[0].items())
    repeat = trainer(subsets[:1], [Member(0, "lds", 0, repeat=1)])
    assert not torch.allclose(repeat.outputs[0], together.outputs[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_devices_give_the_same_models_up_to_rounding(photos):
    members, subsets = [Member(0, "lds", 0)], torch.arange(15)[None]
    outputs = [GroupTrainer(photos, RECIPE, SMALL, device=d)(subsets, members).outputs for d in ("cpu", "cuda")]
    torch.testing.assert_close(*outputs, rtol=0.1, atol=0.1)


def test_training_uses_the_subset_and_fits_it(photos):
    recipe = ImageRecipe(lr=0.05, epochs=12, batch_size=10, warm_up=0.3)
    trainer = GroupTrainer(photos, recipe, SMALL, device="cpu")
    right = trainer(torch.arange(30)[None], [Member(0, "lds", 0)])
    assert right.metrics["accuracy"][0] >= 0.8
    flipped = replace(photos, train_y=1 - photos.train_y)
    wrong = GroupTrainer(flipped, recipe, SMALL, device="cpu")(torch.arange(30)[None], [Member(0, "lds", 0)])
    assert wrong.metrics["accuracy"][0] <= 0.2
    assert right.outputs.mean() > wrong.outputs.mean()


def test_scales_are_those_of_the_paper():
    small, full = resnet9_cifar2.protocol("embedded"), resnet9_cifar2.protocol("paper", recipe="paper")
    assert (full.n_train, full.n_query, full.n_lds, full.n_trak) == (5000, 500, 50, 10)
    assert full.n_lds * full.second_seed_share == 25
    assert full.recipe == ImageRecipe(lr=0.01, epochs=10, momentum=0.9, batch_size=64, warm_up=0.0)
    assert full.sizes == ResNet9Sizes(64)
    cycle = resnet9_cifar2.protocol("paper").recipe
    assert (cycle.lr, cycle.epochs, cycle.momentum, cycle.batch_size) == (0.05, 24, 0.9, 64)
    assert small.sizes.width < 64
    assert set(RECIPES["embedded"]) == set(RECIPES["paper"])


def test_specs_are_those_of_the_published_rows():
    from grass_lib.report.matching import like_for_like
    from grass_lib.report.published import published_rows

    wanted = set()
    for row in published_rows("resnet9_cifar2"):
        projection = like_for_like(row["projection"])
        wanted.add(projection if row["sparsification"] == "identity" else f"{row['sparsification']}->{projection}")
    plain, masked = resnet9_cifar2.protocol("paper"), resnet9_cifar2.protocol("paper", masks="learned")
    assert wanted <= set(masked.specs())
    assert set(masked.specs()) - wanted == {f"fjlt-{k}" for k in masked.ks}
    assert {spec for spec in wanted if "selective" not in spec} <= set(plain.specs())
    assert not any("selective" in spec for spec in plain.specs())
    for chosen in (plain, masked, resnet9_cifar2.protocol("embedded", masks="energy")):
        assert [str(CompressionSpec.parse(spec)) for spec in chosen.specs()] == list(chosen.specs())
        assert [str(spec) for spec in chosen.compressions()] == list(chosen.specs())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_lds": -1}, "n_lds"),
        ({"n_lds": 2}, "at least 3"),
        ({"recipe": "long"}, "one_cycle, paper"),
        ({"masks": "best"}, "'energy', 'learned'"),
        ({"target": "accuracy"}, "loss or margin"),
    ],
)
def test_bad_protocols(options, message):
    with pytest.raises(UsageError, match=message):
        resnet9_cifar2.protocol("embedded", **options)
    with pytest.raises(UsageError, match="scale"):
        resnet9_cifar2.protocol("full")


def test_compressions_are_checked_before_any_training():
    chosen = resnet9_cifar2.protocol("embedded")
    with pytest.raises(SpecError, match="76298"):
        chosen.compressions("random_mask-99999")
    with pytest.raises(SpecError, match="whole gradients"):
        chosen.compressions("random_mask-8*8->sjlt-8")
    with pytest.raises(UsageError, match="masks=energy"):
        chosen.compressions("selective_mask-8")
    with pytest.raises(SpecError, match="selective type second"):
        resnet9_cifar2.protocol("embedded", masks="energy").compressions("random_mask-64->selective_mask-8")
    assert len(resnet9_cifar2.protocol("paper").compressions("random_mask-131072->sjlt-2048")) == 1
    assert 10.0 in chosen.damping_grid("paper")
    with pytest.raises(UsageError, match="relative, paper"):
        chosen.damping_grid("absolute")


def test_bank_and_checkpoints(photos, tmp_path):
    bank = resnet9_cifar2.train_lds_bank(TINY, photos, tmp_path, device="cpu", progress=False)
    assert bank.outputs.shape == (4, 2, 10)
    assert bank.metrics["accuracy"].shape == (4, 2)
    assert lds(torch.randn(30, 10), bank).n_models == 4
    states = resnet9_cifar2.trak_checkpoints(TINY, photos, tmp_path, device="cpu", progress=False)
    assert len(states) == 2
    stored, model = bank_in(tmp_path, "trak"), resnet9_cifar2.make_model(TINY).eval()
    for index, state in enumerate(states):
        logits = functional_call(model, state, (photos.query_x,))
        # Higher is better, as in every experiment: minus the loss of the right class.
        expected = -functional.cross_entropy(logits, photos.query_y, reduction="none")
        torch.testing.assert_close(stored.outputs[index, 0], expected, rtol=1e-4, atol=1e-5)
        assert stored.metrics["accuracy"][index, 0] == (logits.argmax(1) == photos.query_y).float().mean()


def test_nothing_is_trained_twice_and_every_choice_has_a_folder(photos, tmp_path, monkeypatch):
    states = resnet9_cifar2.trak_checkpoints(TINY, photos, tmp_path, device="cpu", progress=False)
    changes = [
        ({"seed": 1}, TINY, photos),
        ({}, replace(TINY, recipe=replace(RECIPE, lr=0.02)), photos),
        ({}, replace(TINY, sizes=ResNet9Sizes(width=3, stem_stride=4)), photos),
        ({}, replace(TINY, target="margin"), photos),
        ({}, TINY, replace(photos, sha256="1" * 64)),
    ]
    for number, (options, protocol, data) in enumerate(changes, start=2):
        resnet9_cifar2.trak_checkpoints(protocol, data, tmp_path, device="cpu", progress=False, **options)
        assert len(list(tmp_path.glob("trak-*"))) == number

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(GroupTrainer, "_train", fail)
    again = resnet9_cifar2.trak_checkpoints(TINY, photos, tmp_path, device="cpu", progress=False)
    for state, old in zip(again, states, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in state.items())


def test_a_diverged_training_stores_nothing(photos, tmp_path):
    wild = replace(TINY, recipe=ImageRecipe(lr=1e30, epochs=2, batch_size=6))
    with pytest.raises(BankError, match="not finite"):
        resnet9_cifar2.train_lds_bank(wild, photos, tmp_path, device="cpu", progress=False)
    assert not list(tmp_path.glob("lds-*/group_*"))


def test_signs_agree_with_the_other_experiments():
    """The gradient step on a training sample raises the outputs of queries that TRAK gives a positive score."""
    assert resnet9_cifar2.protocol("paper").target == mlp_mnist.protocol("paper").target == "loss"
    model = ResNet9(SMALL).eval()
    load_state(model, initial_state(SMALL, Stream(3, "d", "init")))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 3, 32, 32, generator=generator), torch.tensor([0, 1, 0, 1, 1, 0])
    trak = TRAK(model, [model.state_dict()], progress=False)
    trak.cache([(x, y)])
    scores = trak.attribute([(x, y)], damping=1e6)
    gradients, _ = PerSampleGradients(model, margin)(None, (x, y))
    before = -functional.cross_entropy(model(x), y, reduction="none")
    with torch.no_grad():
        start = 0
        for parameter in model.parameters():
            size = parameter.numel()
            parameter.add_(gradients[0, start : start + size].view_as(parameter), alpha=1e-3)
            start += size
        change = -functional.cross_entropy(model(x), y, reduction="none") - before
    clear = change.abs() > 0.05 * change.abs().max()
    assert change[0] > 0
    assert torch.equal(change[clear] > 0, scores[0][clear] > 0)


@pytest.mark.parametrize("method", ["energy", "learned"])
def test_masks_are_fitted_once_and_used(method, photos, tmp_path, monkeypatch):
    protocol = replace(TINY, masks=method)
    checkpoints = [initial_state(SMALL, Stream(index, "e", "init")) for index in range(2)]
    specs = protocol.compressions("selective_mask-16,selective_mask-40->sjlt-8,sjlt-8")
    masks = fit_masks(protocol, specs, checkpoints, photos, tmp_path, device="cpu", progress=False)
    assert list(masks) == ["selective_mask-16", "selective_mask-40->sjlt-8"]
    assert [mask.k for mask in masks["selective_mask-16"]] == [16, 16]
    assert (masks["selective_mask-16"][0] is masks["selective_mask-16"][1]) == (method == "learned")
    trak = TRAK(resnet9_cifar2.make_model(protocol), checkpoints, specs=specs, masks=masks, progress=False)
    trak.cache(resnet9_cifar2.batches(photos.train_x, photos.train_y))
    assert trak.attribute(resnet9_cifar2.batches(photos.query_x, photos.query_y))["selective_mask-16"].shape == (30, 10)

    def fail(*args, **options):
        raise AssertionError("fitted again")

    monkeypatch.setattr("grass_lib.experiments.resnet9_masks.fit", fail)
    monkeypatch.setattr("grass_lib.experiments.resnet9_masks.second_moments", fail)
    again = fit_masks(protocol, specs, checkpoints, photos, tmp_path, device="cpu", progress=False)
    for name, found in again.items():
        for mask, old in zip(found, masks[name], strict=True):
            assert torch.equal(mask.indices, old.indices)
    with pytest.raises(AssertionError, match="fitted again"):
        fit_masks(protocol, specs, checkpoints, replace(photos, sha256="1" * 64), tmp_path, device="cpu")


def test_energy_masks_keep_the_largest_second_moments(photos, tmp_path):
    checkpoint = initial_state(SMALL, Stream(0, "f", "init"))
    specs = TINY.compressions("selective_mask-16")
    (mask,) = fit_masks(TINY, specs, [checkpoint], photos, tmp_path, device="cpu")["selective_mask-16"]
    model = resnet9_cifar2.make_model(TINY)
    model.load_state_dict(checkpoint)
    rows, _ = PerSampleGradients(model, margin)(None, (photos.train_x[:24], photos.train_y[:24]))
    energy = rows.double().square().mean(dim=0)
    assert energy[mask.indices].min() >= energy.topk(16).values.min() * (1 - 1e-6)


def test_without_selective_specs_nothing_is_fitted(photos, tmp_path):
    assert fit_masks(TINY, TINY.compressions("sjlt-8"), [], photos, tmp_path / "none", device="cpu") == {}
    assert not (tmp_path / "none").exists()


def test_registry():
    experiment = EXPERIMENTS["resnet9_cifar2"]
    assert experiment.check("embedded") == []
    assert len(experiment.data_fingerprint("embedded")) == 64
    if not torch.cuda.is_available():
        assert any("needs a CUDA GPU" in problem for problem in experiment.check("paper"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("convention", "x", "relative, paper"),
        ("gallery", 9, "0 to 6"),
        ("n_lds_models", -2, "n_lds"),
        ("device", "tpu", "device"),
        ("specs", "sjlt", "sjlt"),
        ("recipe", "long", "recipe"),
        ("masks", "x", "masks"),
        ("data", "cats", "data"),
    ],
)
def test_parameters_that_cannot_work_fail_before_anything_runs(name, value, message):
    good = {
        **{"specs": "", "convention": "relative", "gallery": 6, "device": "cpu", "n_lds_models": 0},
        **{"n_trak_models": 0, "recipe": "one_cycle", "masks": "", "data": ""},
    }
    resnet9_cifar2.validate("embedded", good)
    with pytest.raises(UsageError, match=message):
        EXPERIMENTS["resnet9_cifar2"].validate("embedded", {**good, name: value})


def test_an_extra_that_is_not_installed_fails_before_anything_runs(monkeypatch):
    monkeypatch.setattr(elpv, "PACKAGE", "no-such-package")
    good = {"specs": "", "convention": "relative", "gallery": 6, "device": "cpu", "n_lds_models": 0, "n_trak_models": 0}
    with pytest.raises(DataError, match="pip install"):
        resnet9_cifar2.validate("embedded", {**good, "recipe": "paper", "masks": "", "data": "elpv"})
