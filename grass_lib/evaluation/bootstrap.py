"""Bootstrap intervals of a mean over queries, with models and queries resampled together.

A replicate repeats some models. Repeated rows tie and carry no news, so that a replicate's correlations are a little
lower on average than those of the sample: percentiles alone would sit low. The replicates are therefore shifted to
have the sample's own mean before percentiles are taken.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.evaluation.ranks import resampled_spearman
from grass_lib.rng import Stream


def draw_counts(n_items: int, n_samples: int, stream: Stream) -> Tensor:
    """How often each item occurs in each bootstrap sample: float64 ``(n_items, n_samples)``, columns sum to n_items."""
    drawn = stream.integers(n_items, (n_items, n_samples))
    counts = torch.zeros((n_items, n_samples), dtype=torch.float64)
    return counts.scatter_add_(0, drawn, torch.ones_like(counts))


def check_options(confidence: float, n_bootstrap: int) -> None:
    """Checks what a user may have chosen.

    Raises:
        UsageError: ``confidence`` is not between 0 and 1, or ``n_bootstrap`` is below 1.
    """
    if not 0.0 < confidence < 1.0:
        raise UsageError(f"confidence is {confidence}; expected a number between 0 and 1, for example 0.95")
    if n_bootstrap < 1:
        raise UsageError(f"n_bootstrap is {n_bootstrap}; expected 1 or more resamples, for example 1000")


def correlation_interval(
    first: Tensor,
    second: Tensor,
    transform: Callable[[Tensor], Tensor],
    *,
    estimate: float,
    lowest: float,
    confidence: float,
    n_bootstrap: int,
    seed: int,
) -> tuple[float, float]:
    """Interval of the mean, over queries, of a function of Spearman's correlation.

    Both sources of chance are resampled in every replicate: the models (rows) and the queries (columns). Columns that
    are constant within a replicate have no correlation and are left out of its mean.

    In simulations with 25 models, a 90 % interval of a noise ceiling covers the true value in 86 % of all cases, with
    plain percentiles in 80 %; one of LDS with 30 to 50 models covers it in 89 to 93 %.

    Args:
        first: ``(n_models, n_query)``.
        second: ``(n_models, n_query)``.
        transform: Applied to the correlations ``(n_query, n_bootstrap)``, NaN where they are not defined.
        estimate: The mean on the sample itself.
        lowest: The smallest value that the transform can give; the largest is 1.
        confidence: Of the interval, for example 0.95.
        n_bootstrap: Number of replicates.
        seed: Of the resampling.

    Returns:
        ``(low, high)``; NaN when no replicate has a defined correlation.
    """
    n_models, n_query = first.shape
    models = draw_counts(n_models, n_bootstrap, Stream(seed, "bootstrap", "models"))
    queries = draw_counts(n_query, n_bootstrap, Stream(seed, "bootstrap", "queries"))
    values = transform(resampled_spearman(first, second, models))
    return shifted_interval(values, queries, estimate=estimate, bounds=(lowest, 1.0), confidence=confidence)


def shifted_interval(
    values: Tensor, queries: Tensor, *, estimate: float, bounds: tuple[float, float], confidence: float
) -> tuple[float, float]:
    """Interval of a mean over queries from its replicates, which are shifted to have the sample's own mean.

    Args:
        values: Of each query in each replicate, ``(n_query, n_bootstrap)``, NaN where not defined.
        queries: How often each query counts, ``(n_query, n_bootstrap)``; changed.
        estimate: The mean on the sample itself.
        bounds: The smallest and the largest value that is possible.
        confidence: Of the interval.

    Returns:
        ``(low, high)``; NaN when no replicate is defined.
    """
    queries.masked_fill_(values.isnan(), 0.0)
    means = (values.nan_to_num_(0.0) * queries).sum(dim=0) / queries.sum(dim=0)
    means = means[~means.isnan()]
    if not len(means):
        return float("nan"), float("nan")
    means = (means + (estimate - means.mean())).clamp_(*bounds)
    tail = (1.0 - confidence) / 2.0
    low, high = torch.quantile(means, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return low, high
