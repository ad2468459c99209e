"""Spearman correlations by the thousand: average ranks of resampled columns as matrix products.

In a bootstrap sample, item r occurs c_r times, and its average rank is the number of drawn items below it plus half of
those that tie with it, plus one half. With the comparisons ``A[r, j] = [x_j < x_r] + [x_j = x_r] / 2`` this is
``A c + 1/2``: one product ranks every bootstrap sample at once, ties included, without a sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers held at once in each of the few arrays of a chunk, 8 bytes each.
_CHUNK_NUMBERS = 1 << 20


def _comparisons(values: Tensor) -> Tensor:
    """``A[q, r, j] = [x_j < x_r] + [x_j = x_r] / 2`` for values ``(q, r)``."""
    this, other = values[:, :, None], values[:, None, :]
    return (other < this).to(torch.float64).add_((other == this).to(torch.float64), alpha=0.5)


def resampled_spearman(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Spearman's rank correlation of two columns in every bootstrap sample, with average ranks for ties.

    Args:
        first: ``(n_models, n_query)``, finite.
        second: ``(n_models, n_query)``, finite.
        counts: ``(n_models, n_samples)``: how often each row was drawn; every column has the same sum.

    Returns:
        float64 ``(n_query, n_samples)``; NaN where one of the columns is constant in the sample.
    """
    n_models, n_query = first.shape
    counts = counts.to(torch.float64)
    size = float(counts[:, 0].sum())
    out = torch.empty((n_query, counts.shape[1]), dtype=torch.float64)
    step = max(1, _CHUNK_NUMBERS // (n_models * max(n_models, counts.shape[1])))
    for start in range(0, n_query, step):
        part = slice(start, start + step)
        # Ranks minus their mean (size + 1) / 2. All are multiples of 1/2, so that a constant column gives exactly 0.
        a = (_comparisons(first[:, part].T) @ counts).sub_(size / 2)
        b = (_comparisons(second[:, part].T) @ counts).sub_(size / 2)
        weighted = a * counts
        covariance = (weighted * b).sum(dim=1)
        spread_a = weighted.mul_(a).sum(dim=1)
        spread_b = b.square_().mul_(counts).sum(dim=1)
        # 0 / 0 is the NaN that stands for "not defined".
        out[part] = covariance / (spread_a.sqrt_() * spread_b.sqrt_())
    return out.clamp_(-1.0, 1.0)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rank correlation of the columns of two matrices, with average ranks for ties.

    Args:
        first: ``(n_models, n_query)``, finite.
        second: ``(n_models, n_query)``, finite.

    Returns:
        float64 ``(n_query,)``; NaN where one of the columns is constant.
    """
    return resampled_spearman(first, second, torch.ones((len(first), 1), dtype=torch.float64)).squeeze(1)
