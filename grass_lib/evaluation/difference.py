"""Difference of two linear datamodeling scores, measured on the same models and queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.evaluation.bootstrap import check_options, draw_counts, shifted_interval
from grass_lib.evaluation.lds import Queries, query_columns, subset_sums
from grass_lib.evaluation.ranks import resampled_spearman, spearman
from grass_lib.evaluation.retraining import RetrainingBank
from grass_lib.rng import Stream


@dataclass(frozen=True, eq=False)
class LDSDifference:
    """How much better one way of scoring is than another.

    Attributes:
        mean: Mean difference over pairs and over the queries where both are defined.
        interval: Bootstrap interval ``(low, high)`` over models and queries, the same ones for both sides.
        by_pair: Mean difference of each pair.
        n_models: Models behind each correlation.
        n_queries: Queries that count.
        confidence: Of the interval.
    """

    mean: float
    interval: tuple[float, float]
    by_pair: tuple[float, ...]
    n_models: int
    n_queries: int
    confidence: float = 0.95

    def __str__(self) -> str:
        """``+0.012 [-0.003, +0.027]``."""
        return f"{self.mean:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"


def lds_difference(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    bank: RetrainingBank,
    queries: Queries = None,
    *,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> LDSDifference:
    """Paired difference of LDS: what both sides share, a lucky bank or easy queries, cancels.

    Args:
        first: Score matrices ``(n_train, n_query)``, one per seed.
        second: Those to compare with, as many, or one for all; the other way round too.
        bank: The retrained models.
        queries: Which queries count; None for all.
        confidence: Of the interval.
        n_bootstrap: Bootstrap replicates.
        seed: Of the bootstrap.

    Returns:
        The mean of first minus second.

    Raises:
        UsageError: The numbers of matrices do not fit, a score is not finite, or no query has both correlations.
    """
    check_options(confidence, n_bootstrap)
    sizes = len(first), len(second)
    if min(sizes) < 1 or (sizes[0] != sizes[1] and min(sizes) > 1):
        raise UsageError(f"there are {sizes[0]} and {sizes[1]} score matrices; expected as many on both sides, or one")
    columns = query_columns(queries, bank.n_query)
    actual = bank.outputs[:, 0].to(torch.float64)[:, columns]
    sides = [[subset_sums(scores, bank.subsets, columns) for scores in side] for side in (first, second)]
    models = draw_counts(bank.n_models, n_bootstrap, Stream(seed, "bootstrap", "models"))
    weights = draw_counts(len(columns), n_bootstrap, Stream(seed, "bootstrap", "queries"))
    sample, replicates = [], []
    for side in sides:
        sample.append([spearman(predicted, actual) for predicted in side] * (max(sizes) // len(side)))
        # Pairs count alike, so that the mean over a side's matrices is all that its replicates need.
        drawn = [resampled_spearman(predicted, actual, models) for predicted in side]
        replicates.append(torch.stack(drawn).mean(dim=0))
    by_query = torch.stack(sample[0]) - torch.stack(sample[1])
    counts = ~by_query.isnan().any(dim=0)
    if not bool(counts.any()):
        raise UsageError("no query has a correlation on both sides: scores or the bank's outputs do not vary")
    by_pair = by_query[:, counts].mean(dim=1)
    mean = float(by_pair.mean())
    interval = shifted_interval(
        (replicates[0] - replicates[1])[counts],
        weights[counts],
        estimate=mean,
        bounds=(-2.0, 2.0),
        confidence=confidence,
    )
    return LDSDifference(mean, interval, tuple(by_pair.tolist()), bank.n_models, int(counts.sum()), confidence)
