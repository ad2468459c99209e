"""Selective Mask (equation 1 of the paper): coordinates whose inner products follow the full ones, by gradient ascent.

Nothing of size n * p is held in float32. A step reads a batch of rows in blocks of columns: with w = m^2, the masked
products are ``A' = sum_j w_j q_j g_j`` over columns, and ``dA'/dw_j`` is the outer product of the columns q_j and g_j.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.errors import UsageError
from grass_lib.masks.objective import Adam, BestMask, LearnedRecipe, score_step, threshold, top_k
from grass_lib.masks.problem import Problem, prepare
from grass_lib.masks.rows import CACHE_BYTES
from grass_lib.masks.source import GradientSource
from grass_lib.rng import Stream


@dataclass(frozen=True, eq=False)
class Learned:
    """A learned mask and how it came about.

    Attributes:
        indices: int64 ``(k,)``, ascending.
        scores: Their scores S ``(k,)``.
        correlation: Mean Spearman correlation of the hard mask on held-out pairs; a little too good, because the mask
            was chosen by it among those of all checks.
        energy_correlation: The same for the k coordinates with the largest second moments.
        steps: Optimiser steps taken.
    """

    indices: Tensor
    scores: Tensor
    correlation: float
    energy_correlation: float
    steps: int

    @property
    def facts(self) -> Mapping[str, str]:
        """What the provenance of the mask says about the training."""
        return {
            "held_out_correlation": f"{self.correlation:.6f}",
            "energy_correlation": f"{self.energy_correlation:.6f}",
            "steps": str(self.steps),
        }


def learn(
    source: GradientSource,
    k: int,
    *,
    queries: GradientSource | None = None,
    seed: int = 0,
    name: str = "",
    recipe: LearnedRecipe | Literal["paper"] | None = None,
    cache_bytes: int = CACHE_BYTES,
    cache_folder: str | Path | None = None,
    progress: bool = True,
) -> Learned:
    """Learns a mask.

    A quarter of the queries and a fifth of the rows (at most 1,000; none where there are fewer than 30) are held out.
    The mask with the best correlation on pairs of these is returned; the energy mask is the first candidate.

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
        recipe: How to train; "paper" for `LearnedRecipe.paper`.
        cache_bytes: Largest copy in memory.
        cache_folder: Folder for a temporary file with the copy.
        progress: Shows a bar when it lasts more than 3 s.

    Returns:
        The mask.

    Raises:
        UsageError: There are too few rows or queries, a gradient is not finite, or all are zero.
    """
    if recipe is None or recipe == "paper":
        recipe = LearnedRecipe() if recipe is None else LearnedRecipe.paper()
    if not isinstance(recipe, LearnedRecipe):
        raise UsageError(f"recipe is {recipe!r}; expected a LearnedRecipe or 'paper'")
    problem = prepare(source, queries, seed=seed, name=name, cache_bytes=cache_bytes, cache_folder=cache_folder)
    best = BestMask(recipe.patience)
    by_energy = top_k(problem.energy, k)
    energy_check = problem.check(by_energy)
    best.offer(energy_check, by_energy, problem.energy[by_energy].to(torch.float32))
    scores = _start_scores(problem, recipe, seed, name)
    first = top_k(scores, k)
    best.offer(problem.check(first), first, scores[first])
    steps = _ascend(problem, scores, k, recipe, best, Stream(seed, name, "mask/order"), progress)
    before = float(energy_check.mean())
    if recipe.choose == "last" or best.indices is None or best.scores is None:
        indices = top_k(scores, k)
        return Learned(indices, scores[indices], float(problem.check(indices).mean()), before, steps)
    return Learned(best.indices, best.scores, best.correlation, before, steps)


def _start_scores(problem: Problem, recipe: LearnedRecipe, seed: int, name: str) -> Tensor:
    """S before the first step, float32 ``(p,)``."""
    energy = problem.energy
    if recipe.start == "random":
        return Stream(seed, name, "mask/start").normal(len(energy), device=energy.device).mul_(0.01)
    level = problem.alignment() if recipe.start == "alignment" else energy
    if not bool((level > 0).any()):
        level = energy
    # A logarithm needs positive numbers: the others start as the smallest of these.
    level = level.clamp(min=float(level[level > 0].min())).log()
    level = level - level.mean()
    return (level / max(1.0, float(level.std(correction=0)))).to(torch.float32)


def _ascend(
    problem: Problem,
    scores: Tensor,
    k: int,
    recipe: LearnedRecipe,
    best: BestMask,
    stream: Stream,
    progress: bool,
) -> int:
    """Adam on the scores, in place; returns the number of steps."""
    rows, n_fit = problem.fit.rows, len(problem.fit.queries)
    size = rows.n if recipe.batch_size is None else min(recipe.batch_size, rows.n)
    n_query = n_fit if recipe.query_batch is None else min(recipe.query_batch, n_fit)
    per_epoch = -(-rows.n // size)
    epochs = max(recipe.epochs, -(-recipe.min_steps // per_epoch))
    total = epochs * per_epoch
    check_every = max(1, total // recipe.checks)
    adam = Adam(scores, recipe.lr, recipe.floor, k)
    step = 0
    with tqdm(total=total, desc="mask", unit="step", disable=not progress, delay=3.0, leave=False) as bar:
        for epoch in range(epochs):
            for positions, part in rows.batches(size, stream.permutation(rows.n, index=epoch)):
                temperature = recipe.temperature(step / max(1, total - 1))
                shift = threshold(scores, k, temperature) if recipe.penalty is None else 0.0
                mask = torch.sigmoid((scores - shift) / temperature)
                if len(positions) >= 3:  # a correlation of two is always 1 or -1
                    picked = stream.permutation(n_fit, index=epochs + step)[:n_query].sort().values
                    gain = problem.gain(mask.square(), positions, part, picked.to(scores.device))
                    gain.mul_(mask).mul_(2.0)
                    adam.step(scores, score_step(gain, mask, temperature, _penalty(mask, k, recipe)))
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
