"""Banks whose outputs come with the project: whole, and of the subsets that their plan says."""

import csv
from collections import Counter
from pathlib import Path

import pytest
import torch

from grass_lib.evaluation import RetrainingBank, noise_ceiling

BANKS = Path(__file__).parents[2] / "book" / "measured" / "banks"
FOLDERS = sorted(path.parent for path in BANKS.glob("*/*/manifest.json"))


def test_there_are_some_and_each_is_described():
    assert FOLDERS
    text = (BANKS / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        assert str(folder.relative_to(BANKS)) in text


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_a_bank_is_whole_and_says_something(folder):
    bank = RetrainingBank.load(folder)
    assert (bank.subsets.sum(dim=1) == bank.subsets.shape[1] // 2).all()
    ceiling = noise_ceiling(bank, torch.arange(bank.n_query))
    (order,) = folder.parent.glob("*.csv")
    with order.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    counts, unit = Counter(), order.stem.removesuffix("s")
    for row in rows:
        counts[row["role"]] += int(row[f"last_{unit}"]) - int(row[f"first_{unit}"]) + 1
    assert counts == {"train": bank.subsets.shape[1], "query": bank.n_query}
    # Two seeds of the same subsets agree: there is something to predict.
    assert ceiling is not None
    assert ceiling.mean > 0.1
    assert bank.outputs[:, 0].std(dim=0).min() > 0
