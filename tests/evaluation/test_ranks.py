import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from grass_lib.evaluation.bootstrap import draw_counts
from grass_lib.evaluation.ranks import resampled_spearman, spearman
from grass_lib.rng import Stream


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_agrees_with_scipy_with_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    a = torch.randint(0, levels, (25, 40), generator=generator).double()
    b = torch.randint(0, levels, (25, 40), generator=generator).double() + a / 2
    expected = [spearmanr(a[:, q], b[:, q]).statistic for q in range(40)]
    torch.testing.assert_close(spearman(a, b), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_constant_column_is_not_defined():
    a = torch.arange(6.0)[:, None].repeat(1, 2)
    a[:, 1] = 0.1
    result = spearman(a, torch.arange(6.0)[:, None].repeat(1, 2))
    assert result[0] == 1.0
    assert result[1].isnan()


def test_resampled_equals_scipy_on_the_drawn_rows():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randint(0, 6, (2, 15, 4), generator=generator).double()
    counts = draw_counts(15, 30, Stream(0, "test"))
    assert torch.equal(counts.sum(dim=0), torch.full((30,), 15.0, dtype=torch.float64))
    result = resampled_spearman(a, b, counts)
    for sample in range(30):
        rows = np.repeat(np.arange(15), counts[:, sample].int().numpy())
        for q in range(4):
            ranks = [rankdata(column[rows, q].numpy()) for column in (a, b)]
            assert result[q, sample].item() == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_chunks_of_queries_do_not_matter(monkeypatch):
    a, b = torch.randn(2, 20, 33, generator=torch.Generator().manual_seed(2)).double()
    counts = draw_counts(20, 10, Stream(0, "test"))
    whole = resampled_spearman(a, b, counts)
    monkeypatch.setattr("grass_lib.evaluation.ranks._CHUNK_NUMBERS", 1000)
    torch.testing.assert_close(resampled_spearman(a, b, counts), whole, atol=1e-14, rtol=0)
