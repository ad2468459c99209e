"""The linear datamodeling score (Park et al. 2023; section 4 of the GraSS paper reports it) with its interval.

For each query, the scores of the samples in a subset are added up, and these sums are compared, by Spearman's rank
correlation over the subsets, with what models retrained on the subsets give for the query. LDS is the mean over
queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.evaluation.bootstrap import check_options, correlation_interval
from grass_lib.evaluation.ceiling import NoiseCeiling, noise_ceiling
from grass_lib.evaluation.ranks import spearman
from grass_lib.evaluation.retraining import RetrainingBank
from grass_lib.scores import as_scores

Queries: TypeAlias = Tensor | slice | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class LDSResult:
    """Linear datamodeling score of one score matrix.

    Attributes:
        mean: Mean correlation over the queries where it is defined.
        interval: Bootstrap interval ``(low, high)`` over models and queries.
        per_query: float64 ``(n_query,)``, NaN where the correlation is not defined.
        noise_ceiling: About the best that any attributor can reach on this bank; None without second seeds.
        n_undefined: Queries left out because their scores or their models' outputs do not vary.
        n_models: Models (subsets) behind each correlation.
        n_queries: Queries, undefined ones included.
        confidence: Of the intervals.
    """

    mean: float
    interval: tuple[float, float]
    per_query: Tensor
    noise_ceiling: NoiseCeiling | None
    n_undefined: int
    n_models: int
    n_queries: int
    confidence: float = 0.95

    def __str__(self) -> str:
        """``0.412 [0.389, 0.433]``, with the number of undefined queries where there are some."""
        text = f"{self.mean:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"
        return f"{text} ({self.n_undefined} of {self.n_queries} queries undefined)" if self.n_undefined else text


def lds(
    scores: Tensor,
    bank: RetrainingBank,
    queries: Queries = None,
    *,
    confidence: float = 0.95,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> LDSResult:
    """Linear datamodeling score of a score matrix against a bank of retrained models.

    Args:
        scores: ``(n_train, n_query)``, any float dtype and device, or an array of NumPy; positive means that training
            on the sample raises the query's output.
        bank: Models retrained on random subsets of the same training set, with outputs for the same queries. Only the
            first seed counts here; second seeds give the noise ceiling.
        queries: Indices (or a slice, or a bool mask) of the queries to report; None for all.
        confidence: Of the intervals.
        n_bootstrap: Bootstrap replicates.
        seed: Of the bootstrap.

    Returns:
        The score with its interval.

    Raises:
        UsageError: The scores are not finite, do not fit the bank or do not vary for any query, the bank has fewer than
            three models, or an option is out of range.
    """
    check_options(confidence, n_bootstrap)
    if bank.n_models < 3:
        raise UsageError(f"the bank has {bank.n_models} models; expected 3 or more, since LDS correlates over models")
    columns = query_columns(queries, bank.n_query)
    predicted = subset_sums(scores, bank.subsets, columns)
    actual = bank.outputs[:, 0].to(torch.float64)[:, columns]
    per_query = spearman(predicted, actual)
    undefined = int(per_query.isnan().sum())
    if undefined == len(columns):
        raise UsageError(
            f"LDS is not defined for any of {undefined} queries: the summed scores, or the bank's outputs, are the "
            "same for all subsets; expected values that vary. Check that the attributor was cached on this training set"
        )
    mean = float(per_query.nanmean())
    interval = correlation_interval(
        predicted,
        actual,
        lambda rho: rho,
        estimate=mean,
        lowest=-1.0,
        confidence=confidence,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    return LDSResult(
        mean=mean,
        interval=interval,
        per_query=per_query,
        noise_ceiling=noise_ceiling(bank, columns, confidence=confidence, n_bootstrap=n_bootstrap, seed=seed),
        n_undefined=undefined,
        n_models=bank.n_models,
        n_queries=len(columns),
        confidence=confidence,
    )


def subset_sums(scores: Tensor, subsets: Tensor, columns: Tensor) -> Tensor:
    """Sum of the scores in each subset, for some queries.

    Args:
        scores: ``(n_train, n_query)``.
        subsets: bool ``(n_models, n_train)``.
        columns: int64 indices of queries.

    Returns:
        float64 ``(n_models, len(columns))`` on the CPU; only their order within a column means anything.

    Raises:
        UsageError: The scores are not finite or have another shape.
    """
    scores, n_train = as_scores(scores), subsets.shape[1]
    if scores.dim() != 2 or scores.shape[0] != n_train or scores.shape[1] <= int(columns.max()):
        raise UsageError(
            f"scores have shape {tuple(scores.shape)}; expected (n_train, n_query) with n_train = {n_train} as in the "
            f"bank and at least {int(columns.max()) + 1} queries"
        )
    chosen = scores[:, columns.to(scores.device)].to(torch.float64)
    if not bool(chosen.isfinite().all()):
        raise UsageError(
            f"scores hold {int((~chosen.isfinite()).sum())} values that are not finite; expected finite numbers. "
            "A larger damping usually helps"
        )
    # The first row is taken off, so that scores that are equal for all samples give exactly equal sums, not rounding
    # noise. In subsets of one size that shifts every sum by the same number.
    first = chosen[0].clone()
    sums = subsets.to(chosen.device, torch.float64) @ chosen.sub_(first)
    sizes = subsets.sum(dim=1)
    if int(sizes.min()) != int(sizes.max()):
        sums += sizes.to(sums.device, torch.float64)[:, None] * first
    return sums.cpu()


def query_columns(queries: Queries, n_query: int) -> Tensor:
    """Indices of the chosen queries.

    Args:
        queries: int indices, a bool mask ``(n_query,)``, a slice, or None for all.
        n_query: Number of queries in the bank.

    Returns:
        int64 ``(n_chosen,)``.

    Raises:
        UsageError: The choice is empty, out of range, of another type, or names a query twice.
    """
    if queries is None or isinstance(queries, slice):
        chosen = torch.arange(n_query)[queries if queries is not None else slice(None)]
    else:
        chosen = torch.as_tensor(queries).cpu()
        if chosen.dtype == torch.bool and chosen.shape == (n_query,):
            chosen = chosen.nonzero().squeeze(1)
    if chosen.dim() != 1 or not len(chosen) or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise UsageError(
            f"queries choose {tuple(chosen.shape)} values of type {chosen.dtype}; expected at least one index below "
            f"{n_query}, a slice, or a bool mask of that length"
        )
    if len(chosen.unique()) != len(chosen):
        raise UsageError("queries name a query more than once; expected each index once")
    low, high = int(chosen.min()), int(chosen.max())
    if low < 0 or high >= n_query:
        raise UsageError(f"queries reach from {low} to {high}; expected indices from 0 to {n_query - 1} as in the bank")
    return chosen.to(torch.int64)


def mean_correlation(scores: Tensor, bank: RetrainingBank, columns: Tensor) -> float:
    """LDS alone, without intervals; NaN where it is not defined for any query.

    Args:
        scores: ``(n_train, n_query)``.
        bank: The retrained models.
        columns: int64 indices of queries.
    """
    actual = bank.outputs[:, 0].to(torch.float64)[:, columns]
    value = float(spearman(subset_sums(scores, bank.subsets, columns), actual).nanmean())
    return value if math.isfinite(value) else float("nan")
