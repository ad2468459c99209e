"""Paired differences of LDS."""

import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.evaluation import BankPlan, RetrainingBank, lds, lds_difference


def additive_bank(n_models=40, n_query=12, seed=0):
    """Outputs that are sums of true influences, and noise as large as they are."""
    generator = torch.Generator().manual_seed(seed)
    subsets = BankPlan(n_train=60, n_models=n_models, seed=seed).subsets()
    influence = torch.randn(60, n_query, generator=generator).double()
    signal = subsets.double() @ influence
    outputs = signal + signal.std(dim=0) * torch.randn(n_models, n_query, generator=generator)
    return RetrainingBank(subsets, outputs[:, None]), influence


def noisy(influence, size, seed):
    return influence + size * torch.randn(influence.shape, generator=torch.Generator().manual_seed(seed)).double()


def test_it_is_the_difference_of_the_means():
    bank, influence = additive_bank()
    first, second = [noisy(influence, 1, s) for s in (1, 2)], [noisy(influence, 3, s) for s in (3, 4)]
    found = lds_difference(first, second, bank, queries=[0, 3, 5])
    pairs = [lds(a, bank, [0, 3, 5]).mean - lds(b, bank, [0, 3, 5]).mean for a, b in zip(first, second, strict=True)]
    assert found.by_pair == pytest.approx(pairs, abs=1e-12)
    assert found.mean == pytest.approx(sum(pairs) / 2, abs=1e-12)
    assert found.interval[0] < found.mean < found.interval[1]
    assert (found.n_models, found.n_queries) == (40, 3)
    assert str(found).startswith("+")


def test_one_matrix_is_compared_with_all():
    bank, influence = additive_bank()
    others = [noisy(influence, 2, s) for s in range(3)]
    found = lds_difference([influence], others, bank)
    back = lds_difference(others, [influence], bank)
    assert len(found.by_pair) == 3
    assert found.mean == pytest.approx(-back.mean, abs=1e-12)


def test_what_is_shared_cancels():
    bank, influence = additive_bank()
    scores = noisy(influence, 1, 1)
    same = lds_difference([scores], [2 * scores], bank)
    assert same.mean == 0.0
    assert same.interval == (0.0, 0.0)
    alone = lds(scores, bank).interval
    near = lds_difference([scores], [noisy(scores, 0.05, 2)], bank).interval
    assert near[1] - near[0] < 0.3 * (alone[1] - alone[0])


def test_a_clear_difference_is_seen_and_none_is_not():
    bank, influence = additive_bank()
    assert lds_difference([influence], [noisy(influence, 5, 1)], bank).interval[0] > 0
    covered = 0
    for seed in range(20):
        low, high = lds_difference(
            [noisy(influence, 2, 2 * seed)], [noisy(influence, 2, 2 * seed + 1)], bank, n_bootstrap=300
        ).interval
        covered += low <= 0 <= high
    assert covered >= 15


def test_bad_input_is_named():
    bank, influence = additive_bank()
    with pytest.raises(UsageError, match="2 and 3"):
        lds_difference([influence] * 2, [influence] * 3, bank)
    with pytest.raises(UsageError, match="no query"):
        lds_difference([torch.zeros_like(influence)], [influence], bank)
