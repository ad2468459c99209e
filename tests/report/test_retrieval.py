"""The check of retrieval: ranks by hand, chance, and shapes that do not fit."""

import matplotlib.pyplot as plt
import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.report.retrieval import own_article_rows, own_article_table, self_influence_figure

TITLES = ["a", "a", "b", "b", "c", "c"]
SCORES = torch.tensor([[5.0, 0.0], [1.0, 3.0], [4.0, 1.0], [0.0, 2.0], [3.0, 9.0], [2.0, 8.0]])


def test_ranks_by_hand():
    first, second = own_article_rows(SCORES, ["x", "y"], ["a", "b"], TITLES, first=3)
    assert first == {
        **{"query": "x", "article": "a", "passages": 2, "found": 1, "by_chance": 1.0, "best_rank": 1},
        "rank_by_chance": 7 / 3,
    }
    assert (second["found"], second["best_rank"]) == (0, 4)
    assert own_article_rows(SCORES, ["x", "y"], ["a", "none"], TITLES)[0]["query"] == "x"
    frame = own_article_table([first, second], 3)
    assert list(frame["among the first 3"]) == [1, 0]


def test_chance_is_right_over_random_orders():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 4000, generator=generator)
    rows = own_article_rows(scores, ["q"] * 4000, ["b"] * 4000, TITLES, first=2)
    assert sum(row["found"] for row in rows) / 4000 == pytest.approx(rows[0]["by_chance"], abs=0.05)
    assert sum(row["best_rank"] for row in rows) / 4000 == pytest.approx(rows[0]["rank_by_chance"], abs=0.1)


def test_what_does_not_fit_is_refused():
    for changes in ({"titles": TITLES[:5]}, {"articles": ["a"]}, {"first": 7}, {"first": 0}):
        given = {"articles": ["a", "b"], "titles": TITLES, "first": 2, **changes}
        with pytest.raises(UsageError, match="expected"):
            own_article_rows(SCORES, ["x", "y"], given["articles"], given["titles"], given["first"])
    with pytest.raises(UsageError, match="no query"):
        own_article_table([])
    with pytest.raises(UsageError, match="self-influence"):
        self_influence_figure([float("nan")])


def test_figure():
    figure = self_influence_figure(torch.rand(50))
    assert figure.axes[0].get_xlabel() == "self-influence"
    assert figure.number not in plt.get_fignums()
