"""Protocol, banks and masks of Music Transformer + MAESTRO, on a few made-up windows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from grass_lib import TRAK
from grass_lib.errors import DataError, SpecError, UsageError
from grass_lib.evaluation import RetrainingBank, lds
from grass_lib.evaluation.plan import Member
from grass_lib.experiments import EXPERIMENTS
from grass_lib.experiments import musictransformer_maestro as experiment
from grass_lib.experiments.data.events import PAD
from grass_lib.experiments.data.windows import EventWindows, Window, event_windows
from grass_lib.experiments.models.music_transformer import MusicSizes, initial_weights
from grass_lib.experiments.music_trainer import MusicRecipe, MusicTrainer, mean_loss, query_outputs
from grass_lib.experiments.training_step import TrainingStep
from grass_lib.gradients import cross_entropy, margin
from grass_lib.gradients.full import PerSampleGradients

SIZES = MusicSizes(layers=2, width=8, heads=2, feedforward=8, length=6)
TINY = replace(
    experiment.protocol("embedded", n_lds=4, n_trak=2),
    sizes=SIZES,
    recipe=MusicRecipe(lr=5e-3, epochs=2, batch_size=8),
    group_size=3,
)


def windows(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 388, (n, 6), generator=generator)
    ids[0, 4:] = PAD
    return [Window(row, int(row[0]), f"{seed}-{place}", "Title", place) for place, row in enumerate(ids)]


@pytest.fixture(scope="module")
def data() -> EventWindows:
    return event_windows(windows(30, 0), windows(10, 1), source="test", licence="none", kind="embedded", rows=40)


def bank_in(folder, role):
    (found,) = folder.glob(f"{role}-*")
    return RetrainingBank.load(found)


def test_scales_are_those_of_the_design():
    small, full = experiment.protocol("embedded"), experiment.protocol("paper")
    assert (full.n_train, full.n_query, full.n_lds, full.n_trak) == (5000, 178, 50, 5)
    assert full.n_lds * full.second_seed_share == 25
    assert full.recipe == MusicRecipe(lr=1e-4, betas=(0.9, 0.98), epochs=20, batch_size=64, dropout=0.1)
    assert full.sizes == MusicSizes(layers=6, width=512, heads=8, feedforward=1024, length=256)
    assert full.masks == small.masks == "energy"
    assert len(small.specs()) == 15
    assert len(full.damping_grid("paper")) == len(small.damping_grid("relative")) == 10


def test_paper_scale_has_every_published_row():
    from grass_lib.report.matching import like_for_like
    from grass_lib.report.published import published_rows

    ours = {str(spec) for spec in experiment.protocol("paper").compressions()}
    rows = published_rows("musictransformer_maestro")
    assert len(rows) == 42
    for row in rows:
        for projection in {row["projection"], like_for_like(row["projection"])}:
            parts = [part for part in (row["sparsification"], projection) if part != "identity"]
            assert "->".join(parts) in ours
        assert row["damping"] in experiment.protocol("paper").damping_grid("paper")
    without = {str(spec) for spec in experiment.protocol("paper", masks="").compressions()}
    assert without == {spec for spec in ours if "selective" not in spec}


@pytest.mark.parametrize("options", [{"n_lds": -1}, {"n_trak": -1}, {"n_lds": 2}, {"masks": "learned"}])
def test_bad_protocols(options):
    with pytest.raises(UsageError, match="expected"):
        experiment.protocol("embedded", **options)
    with pytest.raises(UsageError, match="scale"):
        experiment.protocol("full")


def test_compressions_are_checked_before_any_training():
    chosen, bare = experiment.protocol("embedded"), experiment.protocol("embedded", masks="")
    assert [str(spec) for spec in chosen.compressions("selective_mask-64->sjlt-8")] == ["selective_mask-64->sjlt-8"]
    for spec, message in (
        ("random_mask-999999", "44550"),
        ("random_mask-8*8->sjlt-8", "whole gradients"),
        ("random_mask-64->selective_mask-8", "fitted mask"),
    ):
        with pytest.raises(SpecError, match=message):
            chosen.compressions(spec)
    with pytest.raises(SpecError, match="fitted mask"):
        bare.compressions("selective_mask-8")
    with pytest.raises(UsageError, match="relative, paper"):
        chosen.damping_grid("absolute")


@pytest.mark.parametrize(
    "change", [{"lr": 0.0}, {"dropout": 1.0}, {"betas": (0.9, 1.0)}, {"epochs": 0}, {"batch_size": 0}]
)
def test_recipes_that_cannot_be(change):
    with pytest.raises(UsageError, match="expected"):
        MusicRecipe(**change)


def test_bank_and_checkpoints(data, tmp_path):
    bank = experiment.train_lds_bank(TINY, data, tmp_path, device="cpu", progress=False)
    assert bank.outputs.shape == (4, 2, 10)
    assert set(bank.metrics) == {"loss", "accuracy", "train_loss"}
    assert (bank.subsets.sum(dim=1) == 15).all()
    assert (bank.outputs[:, 0] < 0).all()
    assert lds(torch.randn(30, 10), bank).n_models == 4
    states = experiment.trak_checkpoints(TINY, data, tmp_path, device="cpu", progress=False)
    stored = bank_in(tmp_path, "trak")
    assert len(states) == 2
    assert not torch.equal(stored.subsets, bank.subsets[:2])
    model = experiment.make_model(TINY)
    for index, state in enumerate(states):
        logits = functional_call(model, state, (data.query_ids,))
        expected = functional.log_softmax(logits, dim=1).gather(1, data.query_labels[:, None]).squeeze(1)
        torch.testing.assert_close(stored.outputs[index, 0], expected)
        # Higher is better in every experiment: the stored output is minus the loss.
        model.load_state_dict(state)
        torch.testing.assert_close(expected, -cross_entropy(model, (data.query_ids, data.query_labels)))
        assert stored.metrics["accuracy"][index, 0] == (logits.argmax(1) == data.query_labels).float().mean()
        assert stored.metrics["loss"][index, 0] == pytest.approx(-float(expected.mean()), rel=1e-5)


def test_models_learn_and_a_known_window_is_likelier(data, tmp_path):
    """The sign of targets: training on a window raises its own output."""
    one = replace(TINY, recipe=MusicRecipe(lr=1e-2, epochs=20, batch_size=8, dropout=0.0))
    same = replace(data, query_ids=data.train_ids[:10], query_labels=data.train_labels[:10])
    bank = experiment.train_lds_bank(one, same, tmp_path, device="cpu", progress=False)
    inside, first = bank.subsets[:, :10], bank.outputs[:, 0]
    assert first[inside].mean() > first[~inside].mean() + 1.0
    assert (bank.metrics["train_loss"][:, 0] < 4.0).all()


def test_the_bank_is_the_same_whatever_was_trained_before(data, tmp_path):
    first = experiment.train_lds_bank(TINY, data, tmp_path / "a", device="cpu", progress=False)
    (folder,) = (tmp_path / "a").glob("lds-*")
    for path in folder.glob("group_001.*"):
        path.unlink()
    torch.manual_seed(123)
    again = experiment.train_lds_bank(TINY, data, tmp_path / "a", device="cpu", progress=False)
    assert torch.equal(first.outputs.nan_to_num(9.0), again.outputs.nan_to_num(9.0))


def test_everything_that_decides_the_models_names_their_folder(data, tmp_path):
    changes = [
        ({}, TINY, data),
        ({"seed": 1}, TINY, data),
        ({}, replace(TINY, recipe=MusicRecipe(lr=5e-3, epochs=2, batch_size=8, betas=(0.9, 0.99))), data),
        ({}, replace(TINY, sizes=replace(SIZES, feedforward=6)), data),
        ({}, replace(TINY, n_trak=1), data),
        ({}, TINY, replace(data, sha256="1" * 64)),
    ]
    for number, (options, protocol, windows) in enumerate(changes, start=1):
        experiment.trak_checkpoints(protocol, windows, tmp_path, device="cpu", progress=False, **options)
        assert len(list(tmp_path.glob("trak-*"))) == number


def test_training_is_adam_on_the_mean_cross_entropy(data):
    """A model against a plain loop of torch.optim.Adam with the same start and order."""
    recipe = MusicRecipe(lr=1e-2, epochs=2, batch_size=8, dropout=0.0)
    member, subset = Member(0, "lds", 3), torch.arange(0, 30, 2)
    trained = MusicTrainer(data, SIZES, recipe, device="cpu")(subset[None], [member])
    model = experiment.make_model(TINY)
    model.load_state_dict(initial_weights(SIZES, member.stream("init")))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98), eps=1e-8)
    for epoch in range(2):
        for part in member.stream("order").permutation(15, index=epoch).split(8):
            rows = subset[part]
            optimizer.zero_grad()
            functional.cross_entropy(model(data.train_ids[rows]), data.train_labels[rows]).backward()
            optimizer.step()
    # Not weight by weight: a bias of keys moves no output, and Adam makes steps of its rounding.
    expected = query_outputs(model(data.query_ids), data.query_labels)
    torch.testing.assert_close(trained.outputs[0], expected.detach(), rtol=1e-3, atol=1e-3)


def test_step_passes_its_betas_on(data):
    model = experiment.make_model(TINY)
    step = TrainingStep(model, mean_loss, batch_size=4, weight_decay=0.0, betas=(0.5, 0.6))
    step.restart(data.train_ids)
    assert step._optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_outputs_against_the_definition():
    logits = torch.randn(5, 390, generator=torch.Generator().manual_seed(0)).double() * 5
    labels = torch.tensor([3, 0, 389, 3, 1])
    for row in range(5):
        p = logits[row].softmax(0)[labels[row]]
        assert query_outputs(logits, labels)[row] == pytest.approx(p.log().item(), rel=1e-5)


def test_masks_keep_the_largest_mean_squares_of_each_model(data, tmp_path):
    states = experiment.trak_checkpoints(TINY, data, tmp_path, device="cpu", progress=False)
    compressions = TINY.compressions("selective_mask-40->sjlt-8,sjlt-8,selective_mask-16,selective_mask-40->normal-4")
    model, loader = experiment.make_model(TINY), experiment.batches(data.train_ids, data.train_labels, 7)
    masks = experiment.energy_masks(model, states, loader, compressions, progress=False)
    assert {name: [len(mask.indices) for mask in found] for name, found in masks.items()} == {
        "selective_mask-40->sjlt-8": [40, 40],
        "selective_mask-16": [16, 16],
        "selective_mask-40->normal-4": [40, 40],
    }
    for index, state in enumerate(states):
        rows, _ = PerSampleGradients(model, margin)(state, (data.train_ids, data.train_labels))
        energy = rows.double().square().mean(dim=0)
        kept = masks["selective_mask-16"][index].indices
        assert energy[kept].min() >= energy.sort(descending=True).values[15] * (1 - 1e-6)
    trak = TRAK(model, states, specs=compressions, masks=masks, progress=False)
    trak.cache(loader)
    queries = experiment.batches(data.query_ids, data.query_labels)
    assert {scores.shape for scores in trak.attribute(queries).values()} == {(30, 10)}
    assert experiment.energy_masks(model, states, loader, TINY.compressions("sjlt-8")) == {}


def test_registry():
    one = EXPERIMENTS["musictransformer_maestro"]
    assert one.scales == ("embedded", "paper")
    assert one.check("embedded") == []
    assert len(one.data_fingerprint("embedded")) == 64
    if not torch.cuda.is_available():
        assert any("needs a CUDA GPU" in problem for problem in one.check("paper"))


GOOD = {
    **{"specs": "", "convention": "relative", "masks": "energy", "gallery": 4, "device": "cpu"},
    **{"n_lds_models": 0, "n_trak_models": 0},
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("convention", "x", "relative, paper"),
        ("gallery", 7, "0 to 6"),
        ("n_lds_models", -2, "n_lds"),
        ("masks", "best", "expected energy"),
        ("device", "tpu", "device"),
        ("specs", "sjlt", "sjlt"),
    ],
)
def test_parameters_that_cannot_work_fail_before_anything_runs(name, value, message):
    experiment.validate("embedded", GOOD)
    with pytest.raises(UsageError, match=message):
        EXPERIMENTS["musictransformer_maestro"].validate("embedded", {**GOOD, name: value})


def test_paper_scale_without_its_data_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    with pytest.raises(DataError, match="GRASS_DATA has no maestro"):
        experiment.validate("paper", GOOD)
    assert "GRASS_DATA has no maestro" in experiment.check("paper")[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_model_is_the_same_each_time_and_near_that_of_the_cpu(data, tmp_path):
    small = replace(TINY, n_lds=3, second_seed_share=0.0, recipe=replace(TINY.recipe, dropout=0.0))
    banks = [
        experiment.train_lds_bank(small, data, tmp_path / name, device=device, progress=False)
        for name, device in (("a", "cuda"), ("b", "cuda"), ("c", "cpu"))
    ]
    assert torch.equal(banks[0].outputs, banks[1].outputs)
    torch.testing.assert_close(banks[0].outputs, banks[2].outputs, atol=0.2, rtol=0.1)


@pytest.mark.system
def test_compiled_training_is_the_same_on_a_cpu(data, tmp_path):
    """What a GPU compiles, compiled here: the same models to rounding."""
    small = replace(TINY, n_lds=3, second_seed_share=0.0, recipe=replace(TINY.recipe, dropout=0.0))
    plain = experiment.train_lds_bank(small, data, tmp_path / "plain", device="cpu", progress=False)
    compiled = experiment.train_lds_bank(small, data, tmp_path / "compiled", device="cpu", compile=True, progress=False)
    torch.testing.assert_close(plain.outputs, compiled.outputs, atol=1e-3, rtol=1e-3)
    names = [json.loads(path.read_text())["recipe"] for path in sorted(Path(tmp_path).glob("*/lds-*/manifest.json"))]
    assert len(set(names)) == 2
