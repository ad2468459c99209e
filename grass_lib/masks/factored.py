"""Masks for linear layers, one for each side of a layer's gradient, as `FactoredGradients` takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grass_lib.errors import UsageError
from grass_lib.gradients.layers import LayerChoice, LayerShape
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.masks.factored_learned import learn_sides, recipe_of
from grass_lib.masks.layer_samples import LayerSamples, collect
from grass_lib.masks.objective import top_k
from grass_lib.masks.uniform import fit_random
from grass_lib.projection import Mask

FACTORED_METHODS = ("random", "energy", "learned")
"""Ways to choose coordinates of layers' sides."""
SIDES = ("output", "input")
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "random": (),
    "energy": (),
    "learned": ("recipe", "samples", "rank", "cache_bytes"),
}
_COLLECTED = ("samples", "rank", "cache_bytes")


def fit_factored(
    model: nn.Module,
    loss: Output,
    loader: Iterable[Batch],
    *,
    layers: LayerChoice = "linear",
    include_head: bool = False,
    k: Sequence[int],
    method: str = "learned",
    queries: Iterable[Batch] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Mask]:
    """Chooses the coordinates to keep on both sides of every layer, from one pass over the data.

    ``random``: those of ``random_mask-K*K`` with the same seed. ``energy``: per side, those with the largest sum over
    samples of the squared norms of the gradient's rows or columns. ``learned``: Selective Mask (section 3.3 of the
    paper) from at most ``samples`` (256) training samples, whose gradients are kept as factors of at most ``rank`` (16)
    rows; options ``recipe`` (a `LearnedRecipe`, or "paper"), ``samples``, ``rank`` and ``cache_bytes``, see `collect`.

    A side with no more coordinates than k keeps all of them, as masks of `FactoredGradients` do.

    Args:
        model: The trained model, on the device where gradients are computed; left as it was found.
        loss: ``loss(model, batch) -> (batch,)``.
        loader: Training samples in a fixed order.
        layers: Which layers, as in `find_layers`: linear ones and transformers' Conv1D.
        include_head: Whether kinds take a language model's output layer too.
        k: Coordinates to keep of the output and of the input side (the bias column counted).
        method: One of `FACTORED_METHODS`.
        queries: Queries for ``learned``; None lets the kept samples be each other's queries.
        seed: Of every random choice.
        device: None for the model's; anything else must be that device.
        provenance: Entries for every mask, such as hashes of model and data.
        progress: Shows bars for work that lasts more than 3 s.
        **options: Of the method.

    Returns:
        Masks on the CPU under ``LAYER/output`` and ``LAYER/input``, with energies or learned S as scores. Their
        provenance has ``method``, ``spec``, ``seed``, ``name`` (the key), ``n`` and ``options``; for ``learned`` also
        ``steps``, ``held_out_correlation`` and ``energy_correlation`` (of the pair of masks, on the same pairs),
        ``samples``, ``rank`` and ``kept_energy`` (share of the squared gradients that is in the factors).

    Raises:
        UsageError: An argument is out of range, or a layer's gradients are all zero, not finite or too few.
    """
    check_method(method, options)
    counts = check_sides(k)
    wanted = {name: options[name] for name in _COLLECTED if name in options}
    if method != "learned":
        wanted["samples"] = 0
    found, n = collect(
        model,
        loss,
        loader,
        layers=layers,
        include_head=include_head,
        queries=queries,
        seed=seed,
        device=device,
        progress=progress,
        **wanted,
    )
    return choose(found, n, counts, method=method, seed=seed, provenance=provenance, progress=progress, **options)


def choose(
    layers: Mapping[str, LayerSamples],
    n: int,
    k: tuple[int, int],
    *,
    method: str,
    seed: int = 0,
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, Mask]:
    """As `fit_factored`, from what `collect` gave.

    Args:
        layers: By name.
        n: Number of training samples.
        k: Coordinates to keep of both sides.
        method: One of `FACTORED_METHODS`.
        seed: Of every random choice.
        provenance: Entries for every mask.
        progress: Shows a bar when it lasts more than 3 s.
        **options: Of the method.

    Raises:
        UsageError: An argument is out of range.
    """
    check_method(method, options)
    recipe = recipe_of(options.get("recipe"))
    own = {
        "method": method,
        "spec": f"selective_mask-{k[0]}*{k[1]}",
        "seed": str(seed),
        "n": str(n),
        "options": json.dumps({key: str(value) for key, value in options.items()}, sort_keys=True),
    }
    masks: dict[str, Mask] = {}
    bar = tqdm(layers.items(), desc="masks", unit="layer", disable=not progress, delay=3.0, leave=False)
    for name, layer in bar:
        counts = min(k[0], layer.shape.d_out), min(k[1], layer.shape.d_in)
        scores: tuple[Tensor, Tensor] | None = None
        facts: dict[str, str] = {}
        if method == "random":
            indices = random_sides(name, layer.shape, counts, seed)
        elif method == "energy":
            indices = energy_sides(layer, counts)
            scores = layer.energy[0][indices[0]], layer.energy[1][indices[1]]
        else:
            learned = learn_sides(layer, counts, name=name, seed=seed, recipe=recipe)
            indices, scores = learned.indices, learned.scores
            facts = {
                "steps": str(learned.steps),
                "samples": str(0 if layer.fit is None else layer.fit.samples.n),
                "rank": str(0 if layer.fit is None else layer.fit.samples.left.shape[1]),
                "kept_energy": f"{layer.kept_energy:.6f}",
                "held_out_correlation": f"{learned.correlation:.6f}",
                "energy_correlation": f"{held_out_correlation(layer, energy_sides(layer, counts)):.6f}",
            }
        for place, side in enumerate(SIDES):
            entries = {**own, "name": f"{name}/{side}", **facts}
            clash = sorted(set(provenance or {}) & set(entries))
            if clash:
                raise UsageError(f"provenance has {', '.join(clash)}, which masks write themselves; use other names")
            d = layer.shape.d_out if place == 0 else layer.shape.d_in
            values = None if scores is None else scores[place]
            masks[f"{name}/{side}"] = Mask(indices[place], d, values, {**(provenance or {}), **entries})
    return masks


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError for a method that there is not, and for options that it does not have."""
    if method not in FACTORED_METHODS:
        raise UsageError(f"method is {method!r}; expected one of {', '.join(FACTORED_METHODS)} for layers")
    unknown = sorted(set(options) - set(_OPTIONS[method]))
    if unknown:
        known = ", ".join(_OPTIONS[method]) or "none"
        raise UsageError(f"method {method!r} has no option {', '.join(unknown)}; its options: {known}")
    recipe_of(options.get("recipe"))


def check_sides(k: Sequence[int]) -> tuple[int, int]:
    """The two counts, output side first.

    Raises:
        UsageError: There are not two whole numbers of at least 1.
    """
    whole = isinstance(k, Sequence) and all(isinstance(side, int) and not isinstance(side, bool) for side in k)
    if not whole or len(k) != 2 or min(k) < 1:
        raise UsageError(f"k is {k!r}; expected (k_out, k_in), two whole numbers of at least 1")
    return k[0], k[1]


def random_sides(name: str, shape: LayerShape, k: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """The coordinates that ``random_mask-K*K`` with the same seed keeps of a layer."""
    return (
        fit_random(shape.d_out, k[0], seed=seed, name=f"{name}/output"),
        fit_random(shape.d_in, k[1], seed=seed, name=f"{name}/input"),
    )


def energy_sides(layer: LayerSamples, k: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The coordinates of both sides with the largest energies; of equal ones the first."""
    return top_k(layer.energy[0], k[0]), top_k(layer.energy[1], k[1])


def held_out_correlation(layer: LayerSamples, indices: tuple[Tensor, Tensor]) -> float:
    """Mean Spearman correlation between full inner products and those of the kept coordinates, on held-out pairs.

    Args:
        layer: With kept samples.
        indices: Kept coordinates of both sides.

    Raises:
        UsageError: No samples were kept.
    """
    if layer.held_out is None:
        raise UsageError("no samples were kept, and a held-out correlation needs them; collect with samples=")
    return float(layer.held_out.check(*indices).mean())


def with_facts(mask: Mask, facts: Mapping[str, str]) -> Mask:
    """The mask with further entries in its provenance."""
    return replace(mask, provenance={**mask.provenance, **facts})
