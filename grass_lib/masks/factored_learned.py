"""Selective Mask for a linear layer (section 3.3 of the paper): one mask for each side, learned together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.masks.layer_samples import LayerSamples
from grass_lib.masks.objective import Adam, BestMask, LearnedRecipe, score_step, threshold, top_k
from grass_lib.masks.token_pairs import Pairs, correlation_gain
from grass_lib.rng import Stream

RECIPE = LearnedRecipe(batch_size=64, query_batch=32)
"""The default; see `LearnedRecipe`. An epoch is one step for each batch of the samples to fit to."""
PAPER = replace(LearnedRecipe.paper(), lr=1e-5, epochs=500, penalty=5e-5, batch_size=100)
"""The schedule of the paper's masks for GPT-2."""
Offer: TypeAlias = Callable[[tuple[Tensor, Tensor]], bool]


@dataclass(frozen=True, eq=False)
class LearnedSides:
    """Learned masks of one layer.

    Attributes:
        indices: Kept coordinates of the output side ``(k_out,)`` and of the input side ``(k_in,)``, ascending.
        scores: Their scores S.
        correlation: Mean Spearman correlation of the pair of hard masks on held-out pairs; a little too good, because
            the masks were chosen by it among those of all checks.
        steps: Optimiser steps taken.
    """

    indices: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    correlation: float
    steps: int


def recipe_of(recipe: LearnedRecipe | Literal["paper"] | None) -> LearnedRecipe:
    """The recipe itself, the default for None, or the paper's.

    Raises:
        UsageError: It is something else.
    """
    recipe = RECIPE if recipe is None else PAPER if recipe == "paper" else recipe
    if not isinstance(recipe, LearnedRecipe):
        raise UsageError(f"recipe is {recipe!r}; expected a LearnedRecipe or 'paper'")
    return recipe


def learn_sides(
    layer: LayerSamples, k: tuple[int, int], *, name: str, seed: int, recipe: LearnedRecipe
) -> LearnedSides:
    """Learns both masks of a layer; the energy masks are the first candidate.

    Scores and optimiser are on the CPU, where they are short vectors; products between samples are where they lie.

    Args:
        layer: With kept samples.
        k: Coordinates to keep of the output and the input side, at most as many as there are.
        name: Of the layer, for the random streams.
        seed: Of every random choice.
        recipe: How to train.

    Raises:
        UsageError: No samples were kept.
    """
    if layer.fit is None or layer.held_out is None:
        raise UsageError(f"no samples were kept at layer '{name}'; a learned mask needs them (samples=)")
    best, held, width = BestMask(recipe.patience), layer.held_out, layer.shape.d_out

    def offer(scores: tuple[Tensor, Tensor]) -> bool:
        chosen = [top_k(side, count) for side, count in zip(scores, k, strict=True)]
        # One candidate is a pair of masks: the input side's coordinates are counted behind those of the output side.
        joined = torch.cat([chosen[0], chosen[1] + width])
        return best.offer(held.check(*chosen), joined, torch.cat(scores)[joined])

    offer((layer.energy[0].float(), layer.energy[1].float()))
    scores = _start_scores(layer, layer.fit, recipe, name, seed)
    offer(scores)
    steps = _ascend(layer.fit, scores, k, recipe, offer, Stream(seed, name, "mask/order"))
    if recipe.choose == "last" or best.indices is None or best.scores is None:
        chosen = [top_k(side, count) for side, count in zip(scores, k, strict=True)]
        correlation = float(held.check(*chosen).mean())
        kept = scores[0][chosen[0]], scores[1][chosen[1]]
        return LearnedSides((chosen[0], chosen[1]), kept, correlation, steps)
    outputs, inputs = best.indices.split(list(k))
    of_outputs, of_inputs = best.scores.split(list(k))
    return LearnedSides((outputs, inputs - width), (of_outputs, of_inputs), best.correlation, steps)


def _start_scores(
    layer: LayerSamples, pairs: Pairs, recipe: LearnedRecipe, name: str, seed: int
) -> tuple[Tensor, Tensor]:
    """S of both sides before the first step, float32 on the CPU."""
    if recipe.start == "random":
        sides = (Stream(seed, f"{name}/{side}", "mask/start") for side in ("output", "input"))
        first, second = (
            stream.normal(len(level)).mul_(0.01) for stream, level in zip(sides, layer.energy, strict=True)
        )
        return first, second
    levels = layer.energy if recipe.start == "energy" else _alignment(pairs)
    first, second = (
        _logarithm(level if bool((level > 0).any()) else energy)
        for level, energy in zip(levels, layer.energy, strict=True)
    )
    return first, second


def _alignment(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Covariance of every coordinate's own products with the full ones, normalised by query; float64 on the CPU.

    The other side is whole: this is what a coordinate brings to the full inner products.
    """
    queries, samples, full = pairs.queries, pairs.samples, pairs.full.to(torch.float64)
    if pairs.alone:
        full = full.clone().fill_diagonal_(0.0)
        full.diagonal().copy_(full.sum(dim=1) / max(1, len(full) - 1))  # the mean: it adds nothing to a covariance
    slope = full - full.mean(dim=1, keepdim=True)
    slope /= slope.square().sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    slope /= slope.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    slope = slope.to(queries.left.dtype)
    totals = [torch.zeros(side.shape[2], dtype=torch.float64) for side in (samples.left, samples.right)]
    left, right = samples.left.flatten(0, 1), samples.right.flatten(0, 1)
    step = max(1, (1 << 24) // max(1, queries.left.shape[1] * len(left)))
    for start in range(0, queries.n, step):
        some = queries.at(torch.arange(start, min(start + step, queries.n)))
        weight = slope[start : start + step].repeat_interleave(queries.left.shape[1], dim=0)
        weight = weight.repeat_interleave(samples.left.shape[1], dim=1)
        outputs, inputs = some.left.flatten(0, 1), some.right.flatten(0, 1)
        totals[0] += (((inputs @ right.mT) * weight @ left) * outputs).sum(dim=0).double().cpu()
        totals[1] += (((outputs @ left.mT) * weight @ right) * inputs).sum(dim=0).double().cpu()
    return totals[0], totals[1]


def _logarithm(level: Tensor) -> Tensor:
    """Centred logarithms of spread at most 1; what is not positive starts as the smallest that is."""
    level = level.clamp(min=float(level[level > 0].min())).log()
    level = level - level.mean()
    return (level / max(1.0, float(level.std(correction=0)))).to(torch.float32)


def _ascend(
    pairs: Pairs,
    scores: tuple[Tensor, Tensor],
    k: tuple[int, int],
    recipe: LearnedRecipe,
    offer: Offer,
    stream: Stream,
) -> int:
    """Adam on the scores of both sides, in place; returns the number of steps."""
    n, n_query, device = pairs.samples.n, pairs.queries.n, pairs.full.device
    wanted = n_query if recipe.query_batch is None else min(recipe.query_batch, n_query)
    if pairs.alone:
        wanted = min(wanted, max(2, n // 3))  # samples that are queries in a step are not its rows
    free = n - wanted if pairs.alone else n
    size = free if recipe.batch_size is None else min(recipe.batch_size, free)
    per_epoch = -(-n // size)
    total = max(recipe.epochs, -(-recipe.min_steps // per_epoch)) * per_epoch
    check_every = max(1, total // recipe.checks)
    adams = [Adam(side, recipe.lr, recipe.floor, count) for side, count in zip(scores, k, strict=True)]
    for step in range(total):
        temperature = recipe.temperature(step / max(1, total - 1))
        order = stream.permutation(n, index=step)
        if pairs.alone:
            asked, rows = order[:wanted], order[wanted : wanted + size]
        else:
            asked, rows = stream.permutation(n_query, index=total + step)[:wanted], order[:size]
        masks = [_mask(side, count, temperature, recipe) for side, count in zip(scores, k, strict=True)]
        full = pairs.full[asked.to(device)][:, rows.to(device)]
        weights = [mask.square().to(device, pairs.queries.left.dtype) for mask in masks]
        gains = correlation_gain(pairs.queries.at(asked), pairs.samples.at(rows), full, (weights[0], weights[1]))
        for side, mask, gain, adam, count in zip(scores, masks, gains, adams, k, strict=True):
            slope = gain.cpu().float().mul_(mask).mul_(2.0)
            adam.step(side, score_step(slope, mask, temperature, _penalty(mask, count, recipe)))
            if recipe.reference_rules and int((side > 0).sum()) < count:
                side[top_k(side, count)] = 5.0  # as the reference does for a side with too few above 0
        if ((step + 1) % check_every == 0 or step + 1 == total) and offer(scores):
            return step + 1
    return total


def _mask(scores: Tensor, k: int, temperature: float, recipe: LearnedRecipe) -> Tensor:
    shift = threshold(scores, k, temperature) if recipe.penalty is None else 0.0
    return torch.sigmoid((scores - shift) / temperature)


def _penalty(mask: Tensor, k: int, recipe: LearnedRecipe) -> float | None:
    if recipe.penalty is None or not recipe.reference_rules:
        return recipe.penalty
    active = int((mask > 0.5).sum())
    return recipe.penalty * (max(0.1, active / (2 * k)) if active <= 2 * k else 1.0)
