"""Choosing a damping value on queries that are not reported (section 6.2 of the protocol: a held-out tenth)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.evaluation.lds import Queries, mean_correlation, query_columns
from grass_lib.evaluation.retraining import RetrainingBank
from grass_lib.rng import Stream
from grass_lib.scores import as_scores


@dataclass(frozen=True)
class DampingChoice:
    """The damping value with the best LDS on the validation queries.

    Attributes:
        value: The chosen value.
        index: Its place in the grid.
        lds: Validation LDS of every value of the grid; NaN where it is not defined.
        at_edge: True when the best value is the smallest or largest of the grid, so that a wider grid may do better.
    """

    value: float
    index: int
    lds: tuple[float, ...]
    at_edge: bool


def split_queries(n_query: int, seed: int, fraction: float = 0.1, least: int = 15) -> tuple[Tensor, Tensor]:
    """Divides queries at random into those that choose the damping and those that are reported.

    Args:
        n_query: Number of queries.
        seed: Of the division.
        fraction: Share of validation queries; their number is rounded down.
        least: Of them, but no more than a third of all: the LDS of a handful of queries is noise, which would choose.

    Returns:
        ``(validation, test)``: ascending int64 indices without overlap.

    Raises:
        UsageError: There are fewer than two queries, or the fraction leaves a part empty.
    """
    if n_query < 2 or not 0.0 < fraction < 1.0:
        raise UsageError(
            f"cannot hold out a fraction {fraction} of {n_query} queries; expected a fraction between 0 and 1 and at "
            "least 2 queries"
        )
    count = max(1, int(fraction * n_query), min(least, n_query // 3))
    order = Stream(seed, "queries", "split").permutation(n_query)
    return order[:count].sort().values, order[count:].sort().values


def choose_damping(
    scores: Tensor, dampings: Sequence[float], bank: RetrainingBank, validation: Queries
) -> DampingChoice:
    """Chooses the damping value whose scores have the highest mean LDS on the validation queries.

    Args:
        scores: ``(n_damping, n_train, n_query)``; only the validation columns are looked at.
        dampings: The grid, one value per leading index of ``scores``.
        bank: The retrained models.
        validation: Indices of the validation queries, for example the first part of `split_queries`.

    Returns:
        The choice; of equal values the first.

    Raises:
        UsageError: Grid and scores do not fit, or no value has a defined LDS.
    """
    scores = as_scores(scores)
    if scores.dim() != 3 or len(scores) != len(dampings) or not len(dampings):
        raise UsageError(
            f"scores have shape {tuple(scores.shape)} for {len(dampings)} damping values; expected "
            "(n_damping, n_train, n_query), as attribute(queries, damping=[...]) returns"
        )
    columns = query_columns(validation, bank.n_query)
    found = [mean_correlation(grid, bank, columns) if _finite(grid, columns) else math.nan for grid in scores]
    if all(math.isnan(value) for value in found):
        raise UsageError(
            f"LDS is not defined for any of the damping values {list(dampings)} on {len(columns)} validation queries: "
            "the scores are not finite or do not vary; expected scores that differ between samples"
        )
    index = max((i for i, value in enumerate(found) if not math.isnan(value)), key=lambda i: found[i])
    value = float(dampings[index])
    edges = {float(min(dampings)), float(max(dampings))}
    return DampingChoice(value=value, index=index, lds=tuple(found), at_edge=len(dampings) > 1 and value in edges)


def _finite(scores: Tensor, columns: Tensor) -> bool:
    """Whether scores can be ranked; a value of the grid that overflowed is passed over, not fatal."""
    return scores.shape[1] <= int(columns.max()) or bool(torch.isfinite(scores[:, columns.to(scores.device)]).all())
