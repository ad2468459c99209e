import math

import pytest
import torch
from banks import random_bank

from grass_lib.errors import UsageError
from grass_lib.evaluation import choose_damping, lds, split_queries


@pytest.mark.parametrize(("n", "count"), [(500, 50), (178, 17), (200, 20), (100, 15), (50, 15), (30, 10), (5, 1)])
def test_split(n, count):
    validation, test = split_queries(n, seed=0)
    assert len(validation) == count
    assert torch.equal(torch.cat([validation, test]).sort().values, torch.arange(n))
    assert torch.equal(validation, split_queries(n, seed=0)[0])


def test_split_depends_on_the_seed():
    assert not torch.equal(split_queries(500, seed=0)[0], split_queries(500, seed=1)[0])


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.1), (10, 0.0), (10, 1.0)])
def test_bad_split(n, fraction):
    with pytest.raises(UsageError, match="hold out"):
        split_queries(n, 0, fraction)


def grid(n=4, seed=1):
    return torch.randn(n, 30, 5, generator=torch.Generator().manual_seed(seed))


def test_chooses_by_validation_queries_alone():
    bank, scores, validation = random_bank(), grid(), torch.tensor([0, 3])
    choice = choose_damping(scores, [0.1, 1.0, 10.0, 100.0], bank, validation)
    expected = [lds(part, bank, validation).mean for part in scores]
    assert choice.lds == pytest.approx(expected)
    assert choice.index == max(range(4), key=expected.__getitem__)
    assert choice.value == [0.1, 1.0, 10.0, 100.0][choice.index]
    assert choice.at_edge == (choice.index in (0, 3))
    others = scores.clone()
    others[:, :, [1, 2, 4]] = torch.nan  # the reported queries are never looked at
    assert choose_damping(others, [0.1, 1.0, 10.0, 100.0], bank, validation) == choice


def test_passes_over_values_that_failed():
    scores = grid()
    scores[0] = torch.nan
    scores[1] = 0.5
    choice = choose_damping(scores, [1e-7, 1e-6, 1.0, 10.0], random_bank(), [0, 1])
    assert choice.index in (2, 3)
    assert [math.isnan(value) for value in choice.lds] == [True, True, False, False]


def test_errors():
    with pytest.raises(UsageError, match=r"\(4, 30, 5\) for 3 damping"):
        choose_damping(grid(), [1, 2, 3], random_bank(), [0])
    with pytest.raises(UsageError, match="not defined for any"):
        choose_damping(grid() * 0, [1, 2, 3, 4], random_bank(), [0])
    with pytest.raises(UsageError, match="n_train = 30"):
        choose_damping(grid()[:, :10], [1, 2, 3, 4], random_bank(), [0])
