import numpy as np
import pytest
import torch

from grass_lib.attribution import topk
from grass_lib.attribution.ranking import TopKMerge, checked_k
from grass_lib.errors import UsageError


def test_proponents_come_down_from_the_top_and_opponents_up_from_the_bottom():
    scores = torch.tensor([[0.5, 1.0], [-2.0, 0.0], [3.0, -1.0], [0.0, 7.0]])
    found = topk(scores, 2)
    assert found.indices.tolist() == [[[2, 0], [1, 3]], [[3, 0], [2, 1]]]
    assert found.scores.tolist() == [[[3.0, 0.5], [-2.0, 0.0]], [[7.0, 1.0], [-1.0, 0.0]]]
    assert found.proponents.tolist() == [[2, 0], [3, 0]]
    assert found.opponents.tolist() == [[1, 3], [2, 1]]


def test_equal_scores_are_ordered_by_training_index():
    found = topk(torch.zeros(50, 3), 4)
    assert found.indices.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]] * 3


def test_many_queries_agree_with_a_plain_sort(monkeypatch):
    monkeypatch.setattr("grass_lib.attribution.ranking._QUERIES_AT_ONCE", 4)
    scores = torch.randn(30, 11, generator=torch.Generator().manual_seed(0))
    found = topk(scores, 30)
    for query in range(11):
        order = sorted(range(30), key=lambda i, q=query: float(scores[i, q]))
        assert found.opponents[query].tolist() == order
        assert found.proponents[query].tolist() == order[::-1]
        torch.testing.assert_close(scores[found.indices[query], query], found.scores[query])


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="k is 5"):
        topk(torch.zeros(4, 2), 5)
    with pytest.raises(UsageError, match="k is 0"):
        topk(torch.zeros(4, 2), 0)
    with pytest.raises(UsageError, match=r"\(2, 4, 2\)"):
        topk(torch.zeros(2, 4, 2), 1)
    with pytest.raises(UsageError, match="NaN"):
        topk(torch.full((4, 2), torch.nan), 1)


@pytest.mark.parametrize("k", [1, 4, 30])
def test_portions_merge_to_the_ranking_of_the_whole(k):
    scores = torch.randint(-3, 4, (30, 11), generator=torch.Generator().manual_seed(0)).float()  # many ties
    merge = TopKMerge(k)
    for part in scores.split([1, 12, 3, 14]):
        merge.update(part)
    found, wanted = merge.result(), topk(scores, k)
    assert torch.equal(found.indices, wanted.indices)
    assert torch.equal(found.scores, wanted.scores)


def test_merging_refuses_what_cannot_be_ranked():
    merge = TopKMerge(5)
    merge.update(torch.zeros(4, 2))
    with pytest.raises(UsageError, match="k is 5"):
        merge.result()
    with pytest.raises(UsageError, match="NaN"):
        merge.update(torch.full((4, 2), torch.nan))


def test_arrays_and_lists_are_ranked():
    scores = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 6.0]])
    expected = topk(scores, 2)
    for given in (scores.tolist(), scores.numpy()):
        assert torch.equal(topk(given, np.int64(2)).indices, expected.indices)
    assert checked_k(np.int64(2), 3) == 2


@pytest.mark.parametrize("k", [2.5, 2.0, True, "2", None])
def test_k_is_a_whole_number(k):
    with pytest.raises(UsageError, match=f"k is {k!r}; expected a whole number between 1 and 3"):
        topk(torch.zeros(3, 2), k)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"sjlt-8": torch.zeros(3, 2)}, "a dict with the keys 'sjlt-8'; expected one tensor .* select one"),
        (None, "scores are a NoneType, which is no matrix of numbers"),
        ([[1.0], [2.0, 3.0]], "scores are a list, which is no matrix of numbers"),
        (torch.zeros(3, 2, dtype=torch.complex64), "complex64; expected real numbers"),
    ],
)
def test_other_scores_are_refused(scores, message):
    with pytest.raises(UsageError, match=message):
        topk(scores, 1)


def test_arrays_may_run_backwards():
    scores = np.arange(6.0).reshape(3, 2)
    assert torch.equal(topk(scores[::-1], 1).indices, topk(scores[::-1].copy(), 1).indices)
