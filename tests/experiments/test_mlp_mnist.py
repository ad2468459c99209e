from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from grass_lib.errors import BankError, SpecError, UsageError
from grass_lib.evaluation import RetrainingBank, lds
from grass_lib.experiments import EXPERIMENTS, mlp_mnist
from grass_lib.experiments.data.mnist import Digits
from grass_lib.experiments.mlp_trainer import query_outputs
from grass_lib.experiments.training import Recipe
from grass_lib.specs import CompressionSpec


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A few random pictures, so that training takes no time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 28, 28), generator=generator).to(torch.uint8)
    x = images.flatten(1).float() / 255
    y = torch.randint(0, 10, (50,), generator=generator)
    return Digits(x[:40], y[:40], x[40:], y[40:], images[:40], images[40:], "test", "embedded", 50, "0" * 64)


def bank_in(folder, role):
    """The only bank of a role below a folder."""
    (found,) = folder.glob(f"{role}-*")
    return RetrainingBank.load(found)


TINY = replace(mlp_mnist.protocol("embedded", n_lds=4, n_trak=2), recipe=Recipe(lr=0.02, epochs=2), group_size=3)


def test_scales_are_those_of_the_design():
    small, full = mlp_mnist.protocol("embedded"), mlp_mnist.protocol("paper")
    assert (small.n_train, small.n_query, small.n_lds, small.n_trak) == (2000, 100, 30, 3)
    assert (full.n_train, full.n_query, full.n_lds, full.n_trak) == (5000, 500, 50, 10)
    assert full.recipe == Recipe(lr=0.01, momentum=0.9, epochs=50, batch_size=64, dropout=0.1)
    assert full.n_lds * full.second_seed_share == 25
    assert len(full.specs()) == 15
    assert small.specs() == (
        *("random_mask-256", "random_mask-512", "random_mask-1024", "sjlt-256", "sjlt-512", "sjlt-1024"),
        *("fjlt-256", "fjlt-512", "fjlt-1024", "grass-256", "grass-512", "grass-1024", "normal-256", "rademacher-256"),
    )
    assert small.specs([64])[-1] == "rademacher-64"
    assert len(small.dampings) == 10
    assert 5e-3 in full.paper_dampings


@pytest.mark.parametrize("scale", ["embedded", "paper"])
def test_every_spec_of_a_scale_parses(scale):
    chosen = mlp_mnist.protocol(scale)
    assert [str(CompressionSpec.parse(spec)) for spec in chosen.specs()] == list(chosen.specs())


@pytest.mark.parametrize("options", [{"n_lds": -1}, {"n_trak": -1}, {"n_lds": 2}, {"target": "accuracy"}])
def test_bad_protocols(options):
    with pytest.raises(UsageError, match="expected"):
        mlp_mnist.protocol("embedded", **options)
    with pytest.raises(UsageError, match="scale"):
        mlp_mnist.protocol("full")


def test_bank_and_checkpoints(digits, tmp_path):
    bank = mlp_mnist.train_lds_bank(TINY, digits, tmp_path, device="cpu", progress=False)
    assert bank.outputs.shape == (4, 2, 10)
    assert bank.metrics["accuracy"].shape == (4, 2)
    assert (bank.subsets.sum(dim=1) == 20).all()
    assert lds(torch.randn(40, 10), bank).n_models == 4
    assert torch.equal(bank_in(tmp_path, "lds").outputs[:2], bank.outputs[:2])
    states = mlp_mnist.trak_checkpoints(TINY, digits, tmp_path, device="cpu", progress=False)
    assert len(states) == 2
    stored = bank_in(tmp_path, "trak")
    model = mlp_mnist.make_model().eval()
    for index, state in enumerate(states):
        logits = functional_call(model, state, (digits.query_x,))
        expected = -functional.cross_entropy(logits, digits.query_y, reduction="none")
        torch.testing.assert_close(stored.outputs[index, 0], expected)
        assert stored.metrics["accuracy"][index, 0] == (logits.argmax(1) == digits.query_y).float().mean()
    assert not torch.allclose(stored.subsets.float(), bank.subsets[:2].float())


def test_one_trak_model_is_enough(digits, tmp_path):
    one = replace(TINY, n_trak=1)
    assert len(mlp_mnist.trak_checkpoints(one, digits, tmp_path, device="cpu", progress=False)) == 1


def test_overlap_takes_the_models_of_the_lds_bank(digits, tmp_path):
    bank = mlp_mnist.train_lds_bank(TINY, digits, tmp_path, device="cpu", progress=False)
    mlp_mnist.trak_checkpoints(TINY, digits, tmp_path / "leak", device="cpu", overlap=True, progress=False)
    leak = bank_in(tmp_path / "leak", "lds")
    assert torch.equal(leak.subsets, bank.subsets[:2])
    assert torch.equal(leak.seeds[:, 0], bank.seeds[:2, 0])
    torch.testing.assert_close(leak.outputs[:, 0], bank.outputs[:2, 0], atol=1e-4, rtol=1e-4)


def test_nothing_is_trained_twice(digits, tmp_path, monkeypatch):
    bank = mlp_mnist.train_lds_bank(TINY, digits, tmp_path, device="cpu", progress=False)
    states = mlp_mnist.trak_checkpoints(TINY, digits, tmp_path, device="cpu", progress=False)

    def fail(*args, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr("grass_lib.experiments.mlp_trainer.train_stacked", fail)
    again = mlp_mnist.train_lds_bank(TINY, digits, tmp_path, device="cpu", progress=False)
    assert torch.equal(again.outputs.nan_to_num(9.0), bank.outputs.nan_to_num(9.0))
    for state, old in zip(
        mlp_mnist.trak_checkpoints(TINY, digits, tmp_path, device="cpu", progress=False), states, strict=True
    ):
        assert all(torch.equal(value, old[name]) for name, value in state.items())


def test_everything_that_decides_the_models_names_their_folder(digits, tmp_path):
    changes = [
        ({}, TINY, digits),
        ({"seed": 1}, TINY, digits),
        ({}, replace(TINY, recipe=Recipe(lr=0.01, epochs=2)), digits),
        ({}, replace(TINY, target="margin"), digits),
        ({}, replace(TINY, n_trak=3), digits),
        ({}, TINY, replace(digits, sha256="1" * 64)),
    ]
    for number, (options, protocol, data) in enumerate(changes, start=1):
        mlp_mnist.trak_checkpoints(protocol, data, tmp_path, device="cpu", progress=False, **options)
        assert len(list(tmp_path.glob("trak-*"))) == number


def test_a_bank_of_another_recipe_is_refused(digits, tmp_path):
    """Also where somebody copies a bank to the place of another one."""
    mlp_mnist.trak_checkpoints(TINY, digits, tmp_path, device="cpu", progress=False)
    (folder,) = tmp_path.glob("trak-*")
    other = replace(TINY, recipe=Recipe(lr=0.01, epochs=2))
    mlp_mnist.trak_checkpoints(other, digits, tmp_path, device="cpu", progress=False)
    (theirs,) = set(tmp_path.glob("trak-*")) - {folder}
    (theirs / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    with pytest.raises(BankError, match="recipe and data are"):
        mlp_mnist.trak_checkpoints(other, digits, tmp_path, device="cpu", progress=False)


def test_outputs_against_the_definition():
    logits = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).double() * 5
    labels = torch.tensor([3, 0, 9, 3, 1])
    for model in range(2):
        for query in range(5):
            p = logits[model, query].softmax(0)[labels[query]]
            assert query_outputs(logits, labels, "loss")[model, query] == pytest.approx(p.log().item())
            assert query_outputs(logits, labels, "margin")[model, query] == pytest.approx((p / (1 - p)).log().item())
    sure = torch.zeros(1, 5, 10)
    sure.scatter_(2, labels[None, :, None], 200.0)
    assert query_outputs(sure, labels, "margin").isfinite().all()


def test_batches_are_in_order(digits):
    parts = mlp_mnist.batches(digits.train_x, digits.train_y, 16)
    assert [len(y) for _, y in parts] == [16, 16, 8]
    assert torch.equal(torch.cat([x for x, _ in parts]), digits.train_x)
    assert torch.equal(torch.cat([y for _, y in parts]), digits.train_y)


def test_registry():
    experiment = EXPERIMENTS["mlp_mnist"]
    assert experiment.scales == ("embedded", "paper")
    assert experiment.check("embedded") == []
    assert len(experiment.data_fingerprint("embedded")) == 64
    if not torch.cuda.is_available():
        assert any("needs a CUDA GPU" in problem for problem in experiment.check("paper"))
    with pytest.raises(UsageError, match="modules is empty"):
        replace(experiment, modules=())


@pytest.mark.system
def test_embedded_models_are_good(tmp_path):
    """The real embedded recipe: every model of a group is right on most of the digits that nobody else uses."""
    from grass_lib.experiments.data.mnist import MEAN, STD, embedded_digits
    from grass_lib.experiments.models.mlp import stacked_logits

    protocol = mlp_mnist.protocol("embedded")
    states = mlp_mnist.trak_checkpoints(
        protocol, mlp_mnist.load_data("embedded"), tmp_path, device="cpu", progress=False
    )
    images, labels = embedded_digits()
    x = (torch.from_numpy(images[2100:]).flatten(1).float() / 255 - MEAN) / STD
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    accuracy = (stacked_logits(stacked, x).argmax(dim=2) == torch.from_numpy(labels[2100:])).float().mean(dim=1)
    assert accuracy.min() > 0.87


def test_compressions_and_convention_are_checked_before_any_training():
    chosen = mlp_mnist.protocol("embedded")
    assert [str(spec) for spec in chosen.compressions()] == list(chosen.specs())
    assert [str(spec) for spec in chosen.compressions("sjlt-8,random_mask-64->sjlt-8")] == [
        "sjlt-8",
        "random_mask-64->sjlt-8",
    ]
    with pytest.raises(SpecError, match="109386"):
        chosen.compressions("random_mask-999999")
    with pytest.raises(SpecError, match="whole gradients"):
        chosen.compressions("random_mask-8*8->sjlt-8")
    assert chosen.damping_grid("relative") == chosen.dampings
    assert 5e-3 in chosen.damping_grid("paper")
    with pytest.raises(UsageError, match="relative, paper"):
        chosen.damping_grid("absolute")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("convention", "x", "relative, paper"),
        ("gallery", 9, "0 to 6"),
        ("n_lds_models", -2, "n_lds"),
        ("device", "tpu", "device"),
        ("specs", "sjlt", "sjlt"),
        ("specs", "selective_mask-64", "needs a fitted mask, and this experiment fits none"),
        ("specs", "random_mask-512->selective_grass-64", "needs a fitted mask"),
        ("specs", "sjlt-64,sjlt-64", "sjlt-64 twice"),
    ],
)
def test_parameters_that_cannot_work_fail_before_anything_runs(name, value, message):
    good = {"specs": "", "convention": "relative", "gallery": 6, "device": "cpu", "n_lds_models": 0, "n_trak_models": 0}
    mlp_mnist.validate("embedded", good)
    with pytest.raises(UsageError, match=message):
        EXPERIMENTS["mlp_mnist"].validate("embedded", {**good, name: value})
