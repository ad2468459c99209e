"""The study of masks on MLP + MNIST: sizes, files, and masks of several checkpoints."""

from dataclasses import replace

import pytest
import torch

from grass_lib import TRAK
from grass_lib.errors import UsageError
from grass_lib.experiments import EXPERIMENTS, mlp_masks, mlp_mnist
from grass_lib.experiments.data.mnist import Digits
from grass_lib.experiments.models.mlp import PARAMETERS
from grass_lib.gradients import margin
from grass_lib.masks import METHODS, hard_mask_correlation
from grass_lib.projection import Mask

FIRST = 784 * 128


@pytest.fixture(scope="module")
def digits() -> Digits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (52, 28, 28), generator=generator).to(torch.uint8)
    x = images.flatten(1).float() / 255
    y = torch.randint(0, 10, (52,), generator=generator)
    return Digits(x[:40], y[:40], x[40:], y[40:], images[:40], images[40:], "test", "embedded", 52, "0" * 64)


@pytest.fixture(scope="module")
def checkpoints():
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(mlp_mnist.make_model().state_dict())
    return states


@pytest.fixture
def fitter(checkpoints, digits, tmp_path):
    return mlp_masks.MaskFitter(checkpoints, digits, tmp_path / "masks", device="cpu", progress=False)


def gradients_of(model, x, y):
    """One by one, by plain autograd."""
    rows = []
    for i in range(len(x)):
        value = margin(model.eval(), (x[i : i + 1], y[i : i + 1])).sum()
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))]))
    return torch.stack(rows)


def test_sizes_of_the_scales():
    small, full = mlp_masks.study("embedded"), mlp_masks.study("paper")
    assert (full.ks, full.n_seeds, full.protocol.n_trak) == ((2048, 4096, 8192), 5, 10)
    assert full.fit_rows == full.protocol.n_train == 5000
    assert full.ways == small.ways == METHODS
    assert (small.n_seeds, small.protocol.n_trak, small.fit_rows) == (1, 2, 1000)
    assert mlp_masks.study("embedded", ways="learned (paper), energy").ways == ("random", "energy", "learned (paper)")
    assert mlp_masks.study("embedded", ks="64,8").ks == (8, 64)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ks", "many", "whole numbers"),
        ("ks", "64,64", "different numbers"),
        ("ks", str(PARAMETERS + 1), str(PARAMETERS)),
        ("ways", "energie", "random, energy"),
        ("n_seeds", -1, "n_seeds"),
        ("n_lds_models", 1, "n_lds"),
        ("device", "tpu", "device"),
    ],
)
def test_parameters_that_cannot_work(name, value, message):
    good = {"ks": "", "ways": "", "n_seeds": 0, "n_lds_models": 0, "n_trak_models": 0, "device": "cpu"}
    experiment = EXPERIMENTS["mlp_masks"]
    experiment.validate("embedded", good)
    with pytest.raises(UsageError, match=message):
        experiment.validate("embedded", {**good, name: value})


def test_masks_are_fitted_at_their_own_checkpoint_once(fitter, checkpoints, digits):
    first, second = fitter("energy", 50, 0), fitter("energy", 50, 1)
    for place, fitted in enumerate((first, second)):
        model = mlp_mnist.make_model()
        model.load_state_dict(checkpoints[place])
        rows = gradients_of(model, digits.train_x, digits.train_y)
        wanted = rows.double().square().mean(dim=0).argsort(descending=True, stable=True)[:50].sort().values
        assert torch.equal(fitted.mask.indices, wanted)
    again = fitter("energy", 50, 0)
    assert again.seconds == first.seconds  # read from the file, not measured again
    assert torch.equal(again.mask.indices, first.mask.indices)


def test_random_masks_differ_by_checkpoint_and_seed(fitter):
    masks = [fitter("random", 50, place, seed=seed).mask for place in (0, 1) for seed in (0, 1)]
    assert len({mask.fingerprint for mask in masks}) == 4


def test_a_mask_of_another_network_is_not_taken(fitter, digits, tmp_path):
    before = fitter("energy", 50, 0).mask
    torch.manual_seed(9)
    others = mlp_masks.MaskFitter(
        [mlp_mnist.make_model().state_dict()], digits, tmp_path / "masks", device="cpu", progress=False
    )
    after = others("energy", 50, 0).mask
    assert after.provenance["model"] != before.provenance["model"]
    assert after.fingerprint != before.fingerprint


def test_the_papers_way_is_the_reference_schedule(fitter, monkeypatch):
    seen = {}

    def fit(source, k, **options):
        seen.update(options)
        return Mask(torch.arange(k), source.p, None, {"method": "learned"})

    monkeypatch.setattr(mlp_masks, "fit", fit)
    fitter(mlp_masks.PAPER_WAY, 50, 0)
    assert (seen["method"], seen["recipe"]) == ("learned", "paper")


def test_correlations_are_of_queries_with_training_rows(fitter, checkpoints, digits):
    masks = [fitter(way, 200, 1).mask for way in ("energy", "random")]
    model = mlp_mnist.make_model()
    model.load_state_dict(checkpoints[1])
    rows = gradients_of(model, digits.train_x, digits.train_y)
    asked = gradients_of(model, digits.query_x[:7], digits.query_y[:7])
    wanted = [hard_mask_correlation(rows, asked, mask.indices)[0] for mask in masks]
    assert fitter.correlation(masks, 1, 7) == pytest.approx(wanted, abs=1e-5)


def test_what_is_kept():
    # Pixel 3 of hidden units 0 and 5, pixel 783 of unit 1, the first bias, the very last weight's bias.
    indices = torch.tensor([3, 784 + 783, 5 * 784 + 3, FIRST, PARAMETERS - 1])
    mask = Mask(indices, PARAMETERS)
    counts = mlp_masks.pixel_counts(mask)
    assert counts.shape == (28, 28)
    assert (int(counts[0, 3]), int(counts[27, 27]), int(counts.sum())) == (2, 1, 3)
    shares = mlp_masks.layer_shares(mask)
    assert [shares[name] for name in ("fc1.weight", "fc1.bias", "fc3.bias")] == [(3, FIRST), (1, 128), (1, 10)]
    assert sum(size for _, size in shares.values()) == PARAMETERS
    other = Mask(torch.tensor([3, 4]), PARAMETERS)
    assert mlp_masks.mean_overlap([other], [mask]) == pytest.approx(0.5)


def test_trak_takes_a_mask_for_each_checkpoint(fitter, checkpoints, digits):
    own = [fitter("energy", 60, place).mask for place in range(2)]
    train, queries = [(digits.train_x, digits.train_y)], [(digits.query_x, digits.query_y)]

    def scores(states, masks):
        trak = TRAK(
            mlp_mnist.make_model(), states, projection="selective_mask-60", masks=masks, device="cpu", progress=False
        )
        trak.cache(train)
        return trak

    # Networks alike and masks not: scores are means over both, the weights being the same.
    same = [checkpoints[0]] * 2
    both, halves = scores(same, own), [scores(same[:1], mask) for mask in own]
    mean = sum(half.attribute(queries, damping=0.1) for half in halves) / 2
    torch.testing.assert_close(both.attribute(queries, damping=0.1), mean, rtol=1e-4, atol=1e-8)
    swapped = scores(checkpoints, own[::-1])
    ordered = scores(checkpoints, own)
    assert not torch.allclose(ordered.attribute(queries, damping=0.1), swapped.attribute(queries, damping=0.1))
    with pytest.raises(UsageError, match="3 entries"):
        scores(checkpoints, [*own, own[0]])


def test_scales_and_data_are_those_of_the_pair():
    experiment = EXPERIMENTS["mlp_masks"]
    assert experiment.check("embedded") == EXPERIMENTS["mlp_mnist"].check("embedded")
    assert experiment.data_fingerprint("embedded") == EXPERIMENTS["mlp_mnist"].data_fingerprint("embedded")
    with pytest.raises(UsageError, match="modules is empty"):
        replace(experiment, modules=())
