"""Selective Mask (equation 1 of the paper): coordinates whose inner products follow the full ones, by gradient ascent.

Nothing of size n * p is held in float32. A step reads a batch of rows in blocks of columns: with w = m^2, the masked
products are ``A' = sum_j w_j q_j g_j`` over columns, and ``dA'/dw_j`` is the outer product of the columns q_j and g_j.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.errors import UsageError
from grass_lib.masks.energy import add_squares
from grass_lib.masks.objective import (
    BestMask,
    LearnedRecipe,
    has_variation,
    pearson_gradient,
    score_step,
    spearman_rows,
    threshold,
    top_k,
)
from grass_lib.masks.rows import CACHE_BYTES, HeldRows, Part, Rows, WalkedRows, column_blocks, hold
from grass_lib.masks.source import GradientSource, check_nonzero
from grass_lib.rng import Stream

MAX_QUERIES = 512
"""Most rows that serve as queries; more are thinned out at random."""


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned mask and how it came about.

    Attributes:
        indices: int64 ``(k,)``, ascending.
        scores: Their scores S ``(k,)``.
        correlation: Mean held-out hard-mask Spearman correlation of the mask.
        start_correlation: The same for the k coordinates that the training started from.
        steps: Optimiser steps taken.
    """

    indices: Tensor
    scores: Tensor
    correlation: float
    start_correlation: float
    steps: int


class _Problem:
    """Rows, queries and their full inner products."""

    def __init__(self, rows: Rows, queries: HeldRows, fit: Tensor, held_out: Tensor) -> None:
        self.rows, self.queries, self.fit, self.held_out = rows, queries, fit, held_out
        self.p = queries.matrix.shape[1]
        self.device = queries.matrix.device
        self.full = torch.empty(queries.n, rows.n, device=self.device)
        everything = torch.arange(queries.n, device=self.device)
        for positions, part in rows.batches(256, torch.arange(rows.n)):
            self.full[:, positions] = self._products(everything, part, None)

    def _products(self, queries: Tensor, part: Part, weights: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for columns in column_blocks(self.p):
            left = self.queries.part(queries, columns)
            if weights is not None:
                left *= weights[columns]
            product = left @ part(columns).mT
            total = product if total is None else total.add_(product)
        if total is None:
            raise UsageError("there are no columns")
        return total

    def gains(self, mask: Tensor, positions: Tensor, part: Part, queries: Tensor) -> tuple[float, Tensor]:
        """Mean correlation of a batch, and its gradient with respect to m ``(p,)``."""
        masked = self._products(queries, part, mask.square())
        full = self.full.index_select(0, queries).index_select(1, positions)
        correlation, slope = pearson_gradient(full, masked)
        # The slope is made of ordinary size for the products in float32, whatever the size of the gradients.
        largest = float(slope.abs().max()) or 1.0
        slope = (slope / largest).to(torch.float32)
        gain = torch.empty(self.p, device=self.device)
        for columns in column_blocks(self.p):
            gain[columns] = ((slope @ part(columns)) * self.queries.part(queries, columns)).sum(dim=0)
        return float(correlation.mean()), gain.mul_(mask).mul_(2.0 * largest)

    def check(self, indices: Tensor) -> float:
        """Mean Spearman correlation of the hard mask on held-out queries and all rows."""
        queries = self.queries.matrix[self.queries.numbers[self.held_out]][:, indices].to(torch.float32)
        full = self.full[self.held_out]
        usable = has_variation(full)
        if not bool(usable.any()):
            return 0.0
        return float(spearman_rows(full[usable], (queries @ self.rows.columns(indices).mT)[usable]).mean())


def learn(
    source: GradientSource,
    k: int,
    *,
    queries: GradientSource | None = None,
    seed: int = 0,
    name: str = "",
    recipe: LearnedRecipe | None = None,
    cache_bytes: int = CACHE_BYTES,
    cache_folder: str | Path | None = None,
    progress: bool = True,
) -> Learned:
    """Learns a mask.

    Memory: ``2 n p`` bytes for a bfloat16 copy of the gradients (none for a matrix that is in memory already),
    ``2 q p`` for at most 512 queries of their own, about ``60 p`` for the scores and Adam, and 100 MiB of blocks. Where
    the copy is larger than ``cache_bytes``, it lies in a file in ``cache_folder``; without one the gradients are
    computed anew in every pass, which holds ``4 p batch_size`` bytes and visits the rows in the source's order.

    Args:
        source: ``(n, p)`` in blocks: gradients of the training samples at the trained model.
        k: Number of coordinates.
        queries: Gradients of queries; None sets a fifth of the rows aside (at most 512) as queries.
        seed: Of every random choice.
        name: Of every random choice.
        recipe: How to train.
        cache_bytes: Largest copy in memory.
        cache_folder: Folder for a temporary file with the copy.
        progress: Shows a bar when it lasts more than 3 s.

    Returns:
        The mask.

    Raises:
        UsageError: There are too few rows or queries, a gradient is not finite, or all are zero.
    """
    recipe = LearnedRecipe() if recipe is None else recipe
    problem, energy = _prepare(source, queries, seed, name, cache_bytes, cache_folder)
    start = top_k(energy, k)
    best = BestMask(recipe.patience)
    scores = _start_scores(energy, recipe, seed, name)
    start_correlation = problem.check(start)
    best.offer(start_correlation, start, scores[start])
    steps = _ascend(problem, scores, k, recipe, best, Stream(seed, name, "mask/order"), progress)
    if recipe.choose == "last" or best.indices is None or best.scores is None:
        indices = top_k(scores, k)
        return Learned(indices, scores[indices], problem.check(indices), start_correlation, steps)
    return Learned(best.indices, best.scores, best.correlation, start_correlation, steps)


def _prepare(
    source: GradientSource,
    queries: GradientSource | None,
    seed: int,
    name: str,
    cache_bytes: int,
    cache_folder: str | Path | None,
) -> tuple[_Problem, Tensor]:
    """Splits rows and queries, keeps what has to be kept, and gives the second moments ``(p,)`` on the way."""
    pool = source if queries is None else queries
    order = Stream(seed, name, "mask/queries").permutation(pool.n)
    n_query = min(MAX_QUERIES, pool.n if queries is not None else max(2, pool.n // 5))
    n_rows = source.n if queries is not None else source.n - n_query
    if n_query < 2 or n_rows < 3:
        raise UsageError(
            f"there are {source.n} gradients and {'no' if queries is None else queries.n} queries; a learned mask "
            "needs at least 3 training samples and 2 queries (5 samples, where queries are taken from them)"
        )
    chosen = order[:n_query].sort().values
    left = torch.ones(source.n, dtype=torch.bool)
    if queries is None:
        left[chosen] = False
    numbers = left.nonzero().flatten()
    energy = torch.zeros(source.p, dtype=torch.float64, device=source.device)

    def add(block: Tensor) -> None:
        add_squares(energy, block)

    numbers, chosen = left.nonzero().flatten().to(source.device), chosen.to(source.device)
    everything = torch.arange(source.n, device=source.device)
    matrix = source.rows
    if matrix is not None:
        for block in source:
            add(block)
    elif 2 * source.n * source.p <= cache_bytes or cache_folder is not None:
        matrix = hold(source, everything, add, folder=cache_folder)
    rows: Rows
    if matrix is not None:
        rows = HeldRows(matrix, numbers)
        held = matrix if queries is None else None
    else:
        places = torch.full((source.n,), -1, dtype=torch.int64, device=source.device)
        places[numbers] = torch.arange(len(numbers), device=source.device)
        rows = WalkedRows(source, places)
        held = None
        if queries is not None:
            for block in source:
                add(block)
    if held is None:
        held = pool.rows if pool.rows is not None else hold(pool, chosen, add if queries is None else _ignore)
        chosen = chosen if pool.rows is not None else torch.arange(n_query, device=held.device)
    check_nonzero(energy)
    scale = float(energy.mean() / source.n) ** -0.5
    shuffled = Stream(seed, name, "mask/held_out").permutation(n_query).to(source.device)
    n_held = max(1, n_query // 4)
    problem = _Problem(rows, HeldRows(held, chosen, scale), shuffled[n_held:].sort().values, shuffled[:n_held])
    return problem, energy


def _ignore(block: Tensor) -> None:
    del block


def _start_scores(energy: Tensor, recipe: LearnedRecipe, seed: int, name: str) -> Tensor:
    """S before the first step, float32 ``(p,)``."""
    if recipe.start == "random":
        return Stream(seed, name, "mask/start").normal(len(energy), device=energy.device).mul_(0.01)
    # A coordinate that is always 0 cannot matter; it starts as the smallest of the others.
    level = energy.clamp(min=float(energy[energy > 0].min())).log()
    spread = float(level.std(correction=0))
    level = level - level.mean()
    return (level / max(1.0, spread)).to(torch.float32)


def _ascend(
    problem: _Problem,
    scores: Tensor,
    k: int,
    recipe: LearnedRecipe,
    best: BestMask,
    stream: Stream,
    progress: bool,
) -> int:
    """Adam on the scores, in place; returns the number of steps."""
    rows = problem.rows
    size = rows.n if recipe.batch_size is None else min(recipe.batch_size, rows.n)
    n_fit = len(problem.fit)
    n_query = n_fit if recipe.query_batch is None else min(recipe.query_batch, n_fit)
    per_epoch = -(-rows.n // size)
    epochs = max(recipe.epochs, -(-recipe.min_steps // per_epoch))
    total = epochs * per_epoch
    check_every = max(1, total // recipe.checks)
    adam = torch.optim.Adam([scores], lr=recipe.lr)
    step = 0
    with tqdm(total=total, desc="mask", unit="step", disable=not progress, delay=3.0, leave=False) as bar:
        for epoch in range(epochs):
            order = stream.permutation(rows.n, index=epoch)
            for positions, part in rows.batches(size, order):
                temperature = recipe.temperature(step / max(1, total - 1))
                shift = threshold(scores, k, temperature) if recipe.penalty is None else 0.0
                mask = torch.sigmoid((scores - shift) / temperature)
                if len(positions) >= 3:
                    picked = problem.fit
                    if n_query < n_fit:
                        drawn = stream.permutation(n_fit, index=epochs + step)[:n_query].sort().values
                        picked = problem.fit[drawn.to(picked.device)]
                    _, gain = problem.gains(mask, positions, part, picked)
                    penalty = _penalty(mask, k, recipe)
                    scores.grad = -score_step(gain, mask, temperature, penalty)
                    adam.step()
                    if recipe.reference_rules:
                        _refill(scores, k, temperature)
                step += 1
                bar.update()
                if step % check_every == 0 or step == total:
                    indices = top_k(scores, k)
                    if best.offer(problem.check(indices), indices, scores[indices]):
                        return step
    return step


def _penalty(mask: Tensor, k: int, recipe: LearnedRecipe) -> float | None:
    if recipe.penalty is None or not recipe.reference_rules:
        return recipe.penalty
    active = int((mask > 0.5).sum())
    return recipe.penalty * (max(0.1, active / (2 * k)) if active <= 2 * k else 1.0)


def _refill(scores: Tensor, k: int, temperature: float) -> None:
    """Sets the k largest scores to 2 tau where fewer than k are above 0 (m > 1/2)."""
    if int((scores > 0).sum()) < k:
        scores[top_k(scores, k)] = 2.0 * temperature


def fit_learned(source: GradientSource, k: int, **options: Any) -> tuple[Tensor, Tensor, Mapping[str, str]]:
    """`learn` as a mask's parts: indices ``(k,)``, scores ``(k,)``, and what the provenance says about the training."""
    found = learn(source, k, **options)
    facts = {
        "held_out_correlation": f"{found.correlation:.6f}",
        "start_correlation": f"{found.start_correlation:.6f}",
        "steps": str(found.steps),
    }
    return found.indices, found.scores, facts
