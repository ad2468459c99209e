import dataclasses

import numpy as np
import pytest
import torch
from banks import random_bank
from scipy.stats import spearmanr

from grass_lib.errors import UsageError
from grass_lib.evaluation import BankPlan, RetrainingBank, choose_damping, lds, lds_difference, noise_ceiling


def loop_lds(scores, bank):
    """Spearman's correlation query by query, from the definition."""
    values = []
    for query in range(bank.n_query):
        predicted = [
            sum(float(scores[i, query]) for i in range(bank.n_train) if bank.subsets[r, i])
            for r in range(bank.n_models)
        ]
        values.append(spearmanr(predicted, bank.outputs[:, 0, query]).statistic)
    return np.array(values)


def additive_bank(noise=0.0, n_models=40, n_query=12, seed=0):
    """Outputs that are sums of true influences, plus noise that differs between the two seeds."""
    generator = torch.Generator().manual_seed(seed)
    subsets = BankPlan(n_train=60, n_models=n_models, seed=seed).subsets()
    influence = torch.randn(60, n_query, generator=generator).double()
    signal = subsets.double() @ influence
    outputs = signal[:, None] + noise * signal.std(dim=0) * torch.randn(n_models, 2, n_query, generator=generator)
    return RetrainingBank(subsets, outputs), influence


def test_arrays_give_what_tensors_give():
    bank = random_bank()
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lds(scores.numpy(), bank).per_query, lds(scores, bank).per_query)
    both = lds_difference([scores.numpy()], [-scores], bank), lds_difference([scores], [-scores], bank)
    assert both[0].by_pair == both[1].by_pair
    grid = torch.stack([scores, -scores])
    assert choose_damping(grid.numpy(), [0.1, 1.0], bank, None) == choose_damping(grid, [0.1, 1.0], bank, None)
    with pytest.raises(UsageError, match=r"a dict with the keys 'sjlt-8'; expected one tensor"):
        lds({"sjlt-8": scores}, bank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_definition(dtype):
    bank = random_bank()
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    result = lds(scores, bank)
    expected = loop_lds(scores, bank)
    np.testing.assert_allclose(result.per_query, expected, atol=1e-12)
    assert result.mean == pytest.approx(expected.mean())
    assert (result.n_models, result.n_queries, result.n_undefined) == (12, 5, 0)
    assert result.interval[0] < result.mean < result.interval[1]


def test_integer_scores_with_tied_sums():
    bank = random_bank(n_models=20)
    scores = torch.randint(0, 2, (30, 5), generator=torch.Generator().manual_seed(3)).double()
    np.testing.assert_allclose(lds(scores, bank).per_query, loop_lds(scores, bank), atol=1e-12)


def test_true_influences_score_one_and_the_sign_counts():
    bank, influence = additive_bank()
    assert lds(influence, bank).mean == pytest.approx(1.0)
    assert lds(-influence, bank).mean == pytest.approx(-1.0)
    assert lds(influence, bank).interval == pytest.approx((1.0, 1.0))


def test_constant_scores_are_undefined_not_rounding_noise():
    bank, influence = additive_bank()
    influence[:, [2, 5]] = 0.1  # 0.1 added up in different orders differs in the last bit
    result = lds(influence, bank)
    assert result.n_undefined == 2
    assert result.per_query[[2, 5]].isnan().all()
    assert result.mean == pytest.approx(1.0)
    assert "2 of 12 queries undefined" in str(result)


def test_constant_outputs_are_undefined():
    bank, influence = additive_bank()
    bank.outputs[:, :, 0] = -0.5
    assert lds(influence, bank).n_undefined == 1


def test_subsets_of_different_sizes():
    generator = torch.Generator().manual_seed(4)
    bank = RetrainingBank(torch.rand(15, 30, generator=generator) < 0.4, torch.randn(15, 1, 5, generator=generator))
    scores = torch.randn(30, 5, generator=generator).double() + 3.0
    np.testing.assert_allclose(lds(scores, bank).per_query, loop_lds(scores, bank), atol=1e-12)


def test_only_the_first_seed_counts():
    bank = random_bank()
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    other = dataclasses.replace(bank, outputs=torch.cat([bank.outputs[:, :1], -(bank.outputs[:, 1:] ** 3)], dim=1))
    assert lds(scores, bank).mean == lds(scores, other).mean
    assert lds(scores, bank).noise_ceiling != lds(scores, other).noise_ceiling


@pytest.mark.parametrize("queries", [torch.tensor([4, 1]), [4, 1], torch.tensor([False, True, False, False, True])])
def test_chosen_queries(queries):
    bank = random_bank()
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    part, whole = lds(scores, bank, queries), lds(scores, bank)
    assert sorted(part.per_query.tolist()) == sorted(whole.per_query[[1, 4]].tolist())
    assert part.n_queries == 2


def test_a_slice_of_queries():
    bank = random_bank()
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lds(scores, bank, slice(1, 3)).per_query, lds(scores, bank).per_query[1:3])


def test_interval_is_reproducible_and_covers():
    """Over many small banks, the 90 % interval holds the value of a huge bank about as often as it says."""
    covered = 0
    n_rounds = 60
    for seed in range(n_rounds):
        generator = torch.Generator().manual_seed(seed)
        # Each query has its own true correlation, mean 0.5: both models and queries vary.
        rho = 0.2 + 0.6 * torch.rand(20, generator=generator).double()
        a = torch.randn(40, 20, generator=generator).double()
        b = rho * a + (1 - rho**2).sqrt() * torch.randn(40, 20, generator=generator).double()
        subsets = torch.eye(40, dtype=torch.bool)
        low, high = lds(a, RetrainingBank(subsets, b[:, None]), confidence=0.9, n_bootstrap=200, seed=seed).interval
        # Spearman's correlation of normals: 6 / pi * asin(rho / 2), averaged over rho in [0.2, 0.8].
        grid = torch.linspace(0.2, 0.8, 601, dtype=torch.float64)
        truth = float((6 / torch.pi * (grid / 2).asin()).mean())
        covered += low <= truth <= high
    assert 0.75 * n_rounds <= covered
    bank, scores = random_bank(), torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    assert lds(scores, bank).interval == lds(scores, bank).interval
    assert lds(scores, bank).interval != lds(scores, bank, seed=1).interval


def test_both_models_and_queries_are_resampled():
    bank, influence = additive_bank()
    bank.outputs[:, :, ::2] *= -1  # half the queries have LDS 1, half -1: only resampling of queries moves the mean
    low, high = lds(influence, bank).interval
    assert low < -0.2
    assert high > 0.2
    one_query, scores = additive_bank(noise=1.0, n_query=1)
    low, high = lds(scores, one_query).interval  # one query: only resampling of models can move the mean
    assert high - low > 0.1


def test_interval_is_around_the_estimate_although_replicates_are_lower():
    bank, scores = additive_bank(noise=1.0, n_models=12, n_query=40)
    for result in (lds(scores, bank), lds(scores, bank).noise_ceiling):
        low, high = result.interval
        assert abs((low + high) / 2 - result.mean) < 0.1 * (high - low)
        assert high <= 1.0


def test_noise_ceiling():
    bank, _ = additive_bank(noise=1.0, n_models=300)
    result = noise_ceiling(bank, torch.arange(bank.n_query))
    r = np.mean([np.sqrt(max(spearmanr(*bank.outputs[:, :, q].T).statistic, 0)) for q in range(bank.n_query)])
    assert result.mean == pytest.approx(r)
    # Equal parts signal and noise: the two seeds correlate by about one half, each with the signal by about sqrt(1/2).
    assert result.mean == pytest.approx(np.sqrt(0.5), abs=0.08)
    assert result.interval[0] < result.mean < result.interval[1]
    assert result.n_models == 300


def test_noise_ceiling_uses_only_pairs_and_needs_them():
    bank, scores = additive_bank(noise=1.0)
    outputs = bank.outputs.clone()
    outputs[20:, 1] = torch.nan
    half = dataclasses.replace(bank, outputs=outputs)
    first = dataclasses.replace(bank, outputs=bank.outputs[:20], subsets=bank.subsets[:20])
    assert lds(scores, half).noise_ceiling == lds(scores, first).noise_ceiling
    assert lds(scores, half).noise_ceiling.n_models == 20
    assert lds(scores, dataclasses.replace(bank, outputs=outputs[:, :1])).noise_ceiling is None
    outputs[2:, 1] = torch.nan
    assert lds(scores, dataclasses.replace(bank, outputs=outputs)).noise_ceiling is None


def test_negative_reliability_counts_as_zero():
    bank, _ = additive_bank()
    bank.outputs[:, 1] *= -1
    assert noise_ceiling(bank, torch.arange(bank.n_query)).mean == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:-1], r"\(29, 5\).*n_train = 30"),
        (lambda s: s[:, :-1], r"\(30, 4\).*at least 5 queries"),
        (lambda s: s[None], r"\(1, 30, 5\)"),
        (lambda s: s * torch.nan, r"150 values that are not finite"),
        (lambda s: s * 0 + 0.3, r"not defined for any of 5 queries"),
    ],
)
def test_bad_scores(change, message):
    with pytest.raises(UsageError, match=message):
        lds(change(torch.randn(30, 5)), random_bank())


@pytest.mark.parametrize("queries", [[], [5], [-1], [0.5], torch.zeros(5).bool(), torch.ones(4).bool()])
def test_bad_queries(queries):
    with pytest.raises(UsageError, match="queries"):
        lds(torch.randn(30, 5), random_bank(), queries)


@pytest.mark.parametrize(("option", "value"), [("confidence", 95), ("confidence", 0.0), ("n_bootstrap", 0)])
def test_bad_options(option, value):
    with pytest.raises(UsageError, match=option):
        lds(torch.randn(30, 5), random_bank(), **{option: value})


def test_bad_banks():
    subsets, outputs = random_bank().subsets, random_bank().outputs
    with pytest.raises(UsageError, match="expected bool"):
        RetrainingBank(subsets.int(), outputs)
    with pytest.raises(UsageError, match="n_models, n_seeds, n_query"):
        RetrainingBank(subsets, outputs[:, 0])
    with pytest.raises(UsageError, match="not finite"):
        RetrainingBank(subsets, outputs * torch.nan)
    with pytest.raises(UsageError, match="3 or more"):
        lds(torch.randn(30, 5), RetrainingBank(subsets[:2], outputs[:2]))
