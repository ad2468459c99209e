"""Flat masks on gradients whose right answer is known."""

import pytest
import torch
from scipy.stats import spearmanr

from grass_lib.errors import UsageError
from grass_lib.masks import METHODS, GradientSource, fit, hard_mask_correlation
from grass_lib.projection import Mask, build_projector

N, P, K = 200, 2000, 60


def planted_energy(seed=0):
    """Signal coordinates have ten times the deviation of the others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, P, generator=generator)
    signal = torch.randperm(P, generator=generator)[:K].sort().values
    rows[:, signal] *= 10
    return rows, signal


def share(mask, signal):
    return len(set(mask.indices.tolist()) & set(signal.tolist())) / len(signal)


@pytest.mark.parametrize(("method", "low", "high"), [("random", 0.0, 0.2), ("energy", 0.95, 1), ("learned", 0.95, 1)])
def test_planted_energy(method, low, high):
    rows, signal = planted_energy()
    mask = fit(rows, K, method=method, progress=False)
    assert (mask.k, mask.p) == (K, P)
    assert low <= share(mask, signal) <= high


def planted_structure(n, seed):
    """Training rows, test rows, signal: all coordinates have variance 1, and those of the signal share 4 factors."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n + N, P, generator=generator)
    signal = torch.randperm(P, generator=generator)[:K].sort().values
    factors = torch.randn(n + N, 4, generator=generator)
    loadings = torch.nn.functional.normalize(torch.randn(4, K, generator=generator), dim=0)
    rows[:, signal] = 0.7**0.5 * factors @ loadings + 0.3**0.5 * rows[:, signal]
    return rows[:n], rows[n:], signal


def test_planted_structure_is_found_where_energy_says_nothing():
    rows, _, signal = planted_structure(1000, seed=1)
    assert share(fit(rows, K, method="learned", progress=False), signal) >= 0.95
    assert share(fit(rows, K, method="energy"), signal) <= 0.2


def test_few_samples_are_enough_to_beat_energy_and_random():
    # With 400 rows not every planted coordinate is found: 40 of them and 20 others follow the full inner products as
    # well as all 60 do, since what they share is of rank 4. So correlations on fresh samples are compared.
    gains = {"energy": [], "random": [], "planted": []}
    for seed in range(3):
        rows, test, signal = planted_structure(400, seed)
        found = {name: fit(rows, K, method=name, progress=False).indices for name in ("learned", "energy", "random")}
        queries, others = test[:60], test[60:]
        reached = {
            name: hard_mask_correlation(others, queries, indices)[0]
            for name, indices in (found | {"planted": signal}).items()
        }
        for name, values in gains.items():
            values.append(reached["learned"] - reached[name])
    assert min(gains["energy"]) >= -0.005
    assert sum(gains["energy"]) / 3 >= 0.1
    assert sum(gains["random"]) / 3 >= 0.1
    assert sum(gains["planted"]) / 3 >= -0.03


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_mask_in_any_blocks(method):
    rows, _ = planted_energy()
    first = fit(GradientSource.from_tensor(rows, block=7), K, method=method, seed=3, progress=False)
    second = fit(GradientSource.from_tensor(rows, block=64), K, method=method, seed=3, progress=False)
    assert torch.equal(first.indices, second.indices)
    assert bool((first.indices[1:] > first.indices[:-1]).all())


def test_random_is_the_mask_of_the_projector():
    rows, _ = planted_energy()
    mask = fit(rows, K, method="random", seed=5, name="layer")
    projector = build_projector(f"random_mask-{K}", P, seed=5, name="layer")
    assert torch.equal(mask.indices, projector.indices)


def test_energy_is_the_second_moment():
    rows, _ = planted_energy()
    moments = rows.double().square().mean(dim=0)
    mask = fit(rows, K, method="energy")
    assert torch.equal(mask.indices, moments.argsort(descending=True, stable=True)[:K].sort().values)
    torch.testing.assert_close(mask.scores.double(), moments[mask.indices], rtol=1e-5, atol=0)


def test_correlation_is_that_of_inner_products():
    rows, _ = planted_energy()
    queries, train, indices = rows[:9], rows[9:], torch.arange(0, P, 5)
    mean, per_query = hard_mask_correlation(train, queries, indices)
    wanted = [
        spearmanr((queries[i] @ train.mT).numpy(), (queries[i, indices] @ train[:, indices].mT).numpy()).statistic
        for i in range(len(queries))
    ]
    torch.testing.assert_close(per_query.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert mean == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_a_mask_keeps_its_origin_in_its_file(tmp_path):
    rows, _ = planted_energy()
    mask = fit(rows, K, method="energy", provenance={"model": "abc"})
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert torch.equal(loaded.indices, mask.indices)
    assert loaded.provenance["model"] == "abc"
    assert loaded.provenance["method"] == "energy"


@pytest.mark.parametrize("method", METHODS)
def test_constant_and_zero_columns_are_fine(method):
    rows, _ = planted_energy()
    rows[:, :100] = 0.0
    rows[:, 100:110] = 3.0
    mask = fit(rows, K, method=method, progress=False)
    assert mask.k == K
    if method == "energy":
        assert int(mask.indices[0]) >= 100


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        (lambda rows: rows.zero_(), K, "zero"),
        (lambda rows: rows.index_put_((torch.tensor([3]), torch.tensor([5])), torch.tensor(torch.nan)), K, "3"),
        (lambda rows: rows, P + 1, str(P)),
        (lambda rows: rows, 0, "0"),
    ],
)
@pytest.mark.parametrize("method", ["energy", "learned"])
def test_bad_input_is_named(method, change, k, message):
    rows = change(planted_energy()[0])
    with pytest.raises(UsageError, match=message):
        fit(rows, k, method=method, progress=False)


def test_too_few_samples_and_unknown_words():
    rows, _ = planted_energy()
    with pytest.raises(UsageError, match="1"):
        fit(rows[:1], K, method="learned", progress=False)
    with pytest.raises(UsageError, match="energy"):
        fit(rows, K, method="energie")
    with pytest.raises(UsageError, match="sketch"):
        fit(rows, K, method="energy", sketch=3)
