"""What a learned mask maximises (equation 1 of the paper), and how it is annealed, checked and stopped.

A mask m in (0, 1)^p on both gradients weights their inner product by m^2. The objective is the mean over queries of the
Pearson correlation between the full and the masked inner products with the training samples, minus a penalty on sum(m).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grass_lib.errors import UsageError

# A row whose variance is below this share of its mean square counts as constant: its centred values are rounding noise.
_CONSTANT = 1e-11


def pearson_rows(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of each row of two matrices; differentiable.

    Args:
        a: ``(queries, samples)``.
        b: ``(queries, samples)``.

    Returns:
        ``(queries,)`` float64; 0, with gradient 0, where one of the rows is constant.
    """
    (x, x_norm, _), (y, y_norm, _) = _centred(a), _centred(b)
    return (x * y).sum(dim=1) / (x_norm * y_norm)


def pearson_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rows' Pearson correlations, and the gradient of their mean with respect to ``b``.

    Args:
        a: ``(queries, samples)``.
        b: ``(queries, samples)``.

    Returns:
        ``(queries,)`` and ``(queries, samples)``, float64.
    """
    (x, x_norm, _), (y, y_norm, y_scale) = _centred(a), _centred(b)
    correlation = (x * y).sum(dim=1) / (x_norm * y_norm)
    slope = x / (x_norm * y_norm)[:, None] - y * (correlation / y_norm.square())[:, None]
    return correlation, slope / (len(a) * y_scale)


def spearman_rows(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of two matrices, with average ranks for ties.

    Args:
        a: ``(queries, samples)``.
        b: ``(queries, samples)``.

    Returns:
        ``(queries,)`` float64; 0 where one of the rows is constant.
    """
    return pearson_rows(_average_ranks(a), _average_ranks(b))


def has_variation(values: Tensor) -> Tensor:
    """Which rows of ``(rows, n)`` are not constant to rounding; bool ``(rows,)``."""
    return torch.isfinite(_centred(values)[1])


def top_k(scores: Tensor, k: int) -> Tensor:
    """The k coordinates with the largest scores, of equal ones the first.

    Args:
        scores: ``(p,)``.
        k: Number of coordinates.

    Returns:
        int64 ``(k,)``, ascending.
    """
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def _average_ranks(values: Tensor) -> Tensor:
    """Ranks from 0 within each row, ties sharing their mean; float64, same shape."""
    values = values.contiguous()
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values, right=False)
    upto = torch.searchsorted(ordered, values, right=True)
    return (below + upto - 1).to(torch.float64) / 2


def _centred(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled rows minus their mean in float64, their norms (infinite for a constant row), and the scales ``(rows, 1)``.

    Rows are divided by their largest entry, which changes no correlation: squares of tiny gradients would underflow.
    """
    values = values.to(torch.float64)
    largest = values.detach().abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    values = values / scale
    centred = values - values.mean(dim=1, keepdim=True)
    square = centred.square().sum(dim=1)
    constant = square <= _CONSTANT * values.square().sum(dim=1)
    norm = torch.where(constant, torch.full_like(square, math.inf), torch.where(constant, 1.0, square).sqrt())
    return torch.where(constant[:, None], torch.zeros_like(centred), centred), norm, scale


@dataclass(frozen=True)
class LearnedRecipe:
    """How a learned mask is trained. The defaults are this library's; `paper` is the reference's own schedule.

    Attributes:
        lr: Step size of Adam on the scores S; about what a score moves in a step.
        epochs: Passes over the training rows.
        penalty: Weight of sum(m) in equation 1. None lets it be what keeps sum(m) = k in every step: the scores are
            shifted by a common threshold, and the penalty is the multiplier of that constraint.
        temperature_start: tau of ``m = sigmoid(S / tau)`` in the first step.
        temperature_end: tau in the last step; it falls geometrically.
        patience: Checks without a better held-out correlation after which training stops; None never stops early.
        batch_size: Training rows in a step; None takes all of them.
        query_batch: Queries in a step; None takes all of them.
        start: The first scores: ``alignment`` and ``energy`` are logarithms of these, of spread at most 1, ``random``
            is 0.01 N(0, 1). The alignment of a coordinate is the covariance of its own products q_j g_j with the full
            inner products: its energy, and what it shares with others. A soft mask that is the same everywhere has
            correlation 1, so that a start near it learns little.
        choose: ``best`` keeps the mask with the best held-out hard-mask correlation, ``last`` the final one.
        checks: How often in the whole training the hard mask is checked on held-out pairs.
        min_steps: Epochs are added until there are so many steps.
        floor: Is added to Adam's root mean squares, as a multiple of the k-th largest of them: with 0 a coordinate
            whose gain is mere noise moves as fast as those that matter.
        reference_rules: Two rules of the reference: a penalty times max(0.1, active / 2k) while active <= 2k, where
            active counts m > 1/2; and S = 2 tau for the k largest whenever fewer than k are active.

    Raises:
        UsageError: A value is out of range.
    """

    lr: float = 0.05
    epochs: int = 4
    penalty: float | None = None
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    patience: int | None = 8
    batch_size: int | None = 256
    query_batch: int | None = 64
    start: Literal["alignment", "energy", "random"] = "alignment"
    choose: Literal["best", "last"] = "best"
    checks: int = 24
    min_steps: int = 240
    floor: float = 1.0
    reference_rules: bool = False

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not 0.0 < self.temperature_end <= self.temperature_start:
            raise UsageError(f"{self}: expected lr above 0, and temperatures above 0 that do not rise")
        if self.penalty is not None and not 0.0 <= self.penalty < math.inf:
            raise UsageError(f"penalty is {self.penalty}; expected 0 or more, or None to hold sum(m) at k")
        for name in ("epochs", "checks", "min_steps", "patience", "batch_size", "query_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected 1 or more")
        if not 0.0 <= self.floor < math.inf:
            raise UsageError(f"floor is {self.floor}; expected 0 or more")
        if self.start not in ("alignment", "energy", "random") or self.choose not in ("best", "last"):
            raise UsageError(
                f"start is {self.start!r} and choose {self.choose!r}; expected alignment, energy or random, and best "
                "or last"
            )

    @classmethod
    def paper(cls) -> LearnedRecipe:
        """The schedule of the paper's MLP masks: no annealing, a random start, all rows in a step, the final mask."""
        return cls(
            lr=5e-5,
            epochs=5000,
            penalty=1e-6,
            temperature_end=1.0,
            patience=None,
            batch_size=None,
            query_batch=None,
            start="random",
            choose="last",
            checks=10,
            min_steps=1,
            floor=0.0,
            reference_rules=True,
        )

    def temperature(self, done: float) -> float:
        """The temperature after a share of the training, in [0, 1]."""
        return self.temperature_start * (self.temperature_end / self.temperature_start) ** min(1.0, max(0.0, done))


def threshold(scores: Tensor, k: int, temperature: float) -> float:
    """The shift c for which ``sum(sigmoid((S - c) / tau))`` is k.

    Args:
        scores: ``(p,)``.
        k: The sum, below p.
        temperature: tau.
    """
    low, high = float(scores.min()) - 40 * temperature, float(scores.max()) + 40 * temperature
    if k >= len(scores):
        return low
    for _ in range(40):
        middle = (low + high) / 2
        total = float(torch.sigmoid((scores - middle) / temperature).sum())
        low, high = (middle, high) if total > k else (low, middle)
        if abs(total - k) <= 1e-3 * k:
            break
    return (low + high) / 2


def score_step(gain: Tensor, mask: Tensor, temperature: float, penalty: float | None) -> Tensor:
    """Gradient of the objective with respect to the scores, uphill.

    Args:
        gain: Gradient of the mean correlation with respect to m ``(p,)``.
        mask: m ``(p,)``.
        temperature: tau.
        penalty: As in `LearnedRecipe`; with None the mean of the gains, weighted by dm/dS, takes its place, which is
            the exact gradient under the constraint sum(m) = k.

    Returns:
        ``(p,)``.
    """
    slope = mask * (1.0 - mask) / temperature
    if penalty is None:
        total = float(slope.sum())
        penalty = float(torch.dot(slope, gain)) / total if total > 0 else 0.0
    return slope * (gain - penalty)


class BestMask:
    """Keeps the mask with the best held-out correlation, and says when to stop."""

    def __init__(self, patience: int | None) -> None:
        """Starts with no mask.

        Args:
            patience: As in `LearnedRecipe`.
        """
        self.indices: Tensor | None = None
        self.scores: Tensor | None = None
        self.correlations: Tensor | None = None
        self._patience = patience
        self._idle = 0

    @property
    def correlation(self) -> float:
        """Mean held-out correlation of the best mask; -inf without one."""
        return -math.inf if self.correlations is None else float(self.correlations.mean())

    def offer(self, correlations: Tensor, indices: Tensor, scores: Tensor) -> bool:
        """Takes a candidate, which replaces the best only where it is better by a standard error over the queries.

        Args:
            correlations: Its held-out hard-mask correlations, by query.
            indices: ``(k,)``.
            scores: ``(k,)``.

        Returns:
            Whether training should stop.
        """
        better = True
        if self.correlations is not None:
            gain = correlations - self.correlations
            error = float(gain.std(correction=1)) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
            better = float(gain.mean()) > error
        if better:
            self.correlations, self.indices, self.scores = correlations, indices.clone(), scores.clone()
            self._idle = 0
        else:
            self._idle += 1
        return self._patience is not None and self._idle >= self._patience


class Adam:
    """Adam (Kingma and Ba, 2015) on one vector, uphill, with a floor under its denominators.

    The floor is relative to the vector, and so the steps do not depend on the size of the gradients.
    """

    def __init__(self, like: Tensor, lr: float, floor: float, k: int) -> None:
        """Starts at 0.

        Args:
            like: The vector ``(p,)``.
            lr: Step size.
            floor: As in `LearnedRecipe`.
            k: Number of coordinates that will be kept.
        """
        self._first, self._second = torch.zeros_like(like), torch.zeros_like(like)
        self._lr, self._floor, self._rank, self._steps = lr, floor, len(like) - k + 1, 0

    def step(self, vector: Tensor, gradient: Tensor) -> None:
        """Moves the vector ``(p,)`` in place."""
        self._steps += 1
        self._first.lerp_(gradient, 0.1)
        self._second.lerp_(gradient.square(), 0.001)
        mean = self._first / (1.0 - 0.9**self._steps)
        root = (self._second / (1.0 - 0.999**self._steps)).sqrt_()
        tiny = torch.finfo(root.dtype).tiny
        floor = self._floor * float(root.kthvalue(self._rank).values) if self._floor else 0.0
        vector.addcdiv_(mean, root.add_(max(floor, tiny)), value=self._lr)
