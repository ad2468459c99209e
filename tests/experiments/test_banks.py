"""Plans and folders of the experiments' banks: names that are on disks, and in the project, must not change."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from grass_lib.errors import UsageError
from grass_lib.evaluation.plan import BankPlan
from grass_lib.experiments.banks import bank_folder, check_models, lds_plan, trak_plan


@dataclass(frozen=True)
class Sizes:
    n_lds: int = 50
    n_trak: int = 5
    second_seed_share: float = 0.5
    group_size: int = 5


def test_plans_are_those_of_the_protocol():
    assert lds_plan(Sizes(), 5000, 3) == BankPlan(
        n_train=5000, n_models=50, seed=3, group_size=5, second_seed_share=0.5, role="lds"
    )
    assert trak_plan(Sizes(), 5000, 3) == BankPlan(
        n_train=5000, n_models=5, seed=3, group_size=5, second_seed_share=0.0, role="trak"
    )
    assert trak_plan(Sizes(), 5000, 3, role="lds").role == "lds"


def test_a_folder_is_named_after_all_that_decides_the_models():
    recipe = "4ca85a9626d3f829b29f22b110daaf6a950d5d4bfe0c6fecfd6e9a1c83c55fde"
    plan = lds_plan(Sizes(), 5000, 0)
    assert bank_folder("networks", plan, recipe) == Path("networks/lds-b7c3e8eb0382")
    others = {bank_folder("networks", lds_plan(Sizes(), 5000, 1), recipe), bank_folder("networks", plan, recipe[::-1])}
    assert len(others | {bank_folder("networks", plan, recipe)}) == 3


@pytest.mark.parametrize(("n_lds", "n_trak"), [(-1, 0), (0, -1), (1, 0), (2, 3)])
def test_numbers_that_cannot_work(n_lds, n_trak):
    with pytest.raises(UsageError, match=f"n_lds is {n_lds} and n_trak {n_trak}; expected 0"):
        check_models(n_lds, n_trak)
    check_models(0, 0)
    check_models(3, 1)
