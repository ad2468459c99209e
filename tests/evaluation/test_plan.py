from itertools import chain

import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.evaluation import BankPlan


def test_subsets_have_the_fraction_and_differ():
    subsets = BankPlan(n_train=101, n_models=20, fraction=0.4).subsets()
    assert subsets.shape == (20, 101)
    assert (subsets.sum(dim=1) == 40).all()
    assert len({tuple(row.tolist()) for row in subsets}) == 20


def test_every_sample_is_as_likely_as_any_other():
    counts = BankPlan(n_train=50, n_models=2000).subsets().sum(dim=0).double()
    # Binomial(2000, 1/2): standard deviation 22.4; five of them are exceeded by one of 50 in about 3e-5 of all seeds.
    assert (counts - 1000).abs().max() < 112


def test_a_longer_plan_keeps_the_first_subsets():
    short, long = BankPlan(n_train=30, n_models=4), BankPlan(n_train=30, n_models=9, group_size=3)
    assert torch.equal(short.subsets(), long.subsets()[:4])


def test_roles_share_no_stream():
    measured = BankPlan(n_train=200, n_models=10, role="lds")
    used = BankPlan(n_train=200, n_models=10, role="trak")
    keys = {role: set() for role in ("lds", "trak")}
    for plan in (measured, used):
        for member in chain.from_iterable(plan.groups()):
            keys[plan.role] |= {member.stream(stage).key for stage in ("init", "order", "dropout", "model")}
    assert not keys["lds"] & keys["trak"]
    assert len(keys["lds"]) == 15 * 4
    equal = (measured.subsets()[:, None] == used.subsets()[None]).double().mean(dim=2)
    # Independent halves agree on half of the samples: standard deviation 0.035.
    assert (equal - 0.5).abs().max() < 0.2


def test_groups():
    plan = BankPlan(n_train=10, n_models=5, group_size=3, second_seed_share=0.5)
    names = [[member.name for member in group] for group in plan.groups()]
    assert names == [["lds/0/0", "lds/1/0", "lds/2/0"], ["lds/3/0", "lds/4/0", "lds/0/1"], ["lds/1/1"]]
    assert BankPlan(n_train=10, n_models=50).n_second == 25
    assert len({member.number for group in plan.groups() for member in group}) == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_train", 0),
        ("n_models", 2.0),
        ("n_models", True),
        ("group_size", 0),
        ("seed", "0"),
        ("fraction", 0.0),
        ("fraction", 1.0),
        ("fraction", 0.01),
        ("fraction", float("nan")),
        ("second_seed_share", 1.5),
        ("role", "test"),
    ],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(UsageError, match=field):
        BankPlan(**{"n_train": 10, "n_models": 4, field: value})
