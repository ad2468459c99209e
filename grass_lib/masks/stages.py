"""Masks of all layers for several sizes, from one pass over the data, each size kept in a file of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from grass_lib.gradients.layers import LayerChoice, find_layers
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.masks.factored import (
    SIDES,
    check_sides,
    choose,
    energy_sides,
    held_out_correlation,
    random_sides,
    with_facts,
)
from grass_lib.masks.files import load_masks, save_masks
from grass_lib.masks.layer_samples import RANK, LayerSamples, collect
from grass_lib.masks.overlap import overlap
from grass_lib.projection import Mask
from grass_lib.specs import StageSpec


@dataclass(frozen=True, eq=False)
class StageMasks:
    """Masks of one size.

    Attributes:
        masks: By side, ``LAYER/output`` and ``LAYER/input``. Their provenance has, besides what `fit_factored` writes,
            the held-out correlations of the masks, of the energy masks and of random ones
            (``held_out_correlation``, ``energy_correlation``, ``random_correlation``; of both sides together), the
            overlap with either (``overlap_energy``, ``overlap_random``) and ``kept_energy``.
        reused: Whether a finished file held them.
    """

    masks: Mapping[str, Mask]
    reused: bool

    def mean(self, fact: str) -> float:
        """Mean over layers of a number in the provenance, such as ``held_out_correlation``."""
        values = [float(mask.provenance[fact]) for key, mask in self.masks.items() if key.endswith(f"/{SIDES[0]}")]
        return sum(values) / len(values)


def fit_stages(
    model: nn.Module,
    loss: Output,
    loader: Iterable[Batch],
    files: Mapping[StageSpec, Path],
    *,
    layers: LayerChoice = "linear",
    include_head: bool = False,
    method: str = "learned",
    recipe: str = "default",
    seed: int = 0,
    rank: int = RANK,
    provenance: Mapping[str, str],
    progress: bool = True,
) -> dict[StageSpec, StageMasks]:
    """Reads the masks that are there and fits the others; a killed call goes on with the first size without a file.

    Args:
        model: The trained model, left as it was found.
        loss: ``loss(model, batch) -> (batch,)``.
        loader: Training samples in a fixed order.
        files: Where the masks of each size are, or go: ``{selective_mask-K*K: file}``; the folders exist.
        layers: Which layers, as in `find_layers`.
        include_head: Whether kinds take a language model's output layer too.
        method: One of `FACTORED_METHODS`.
        recipe: ``default`` or ``paper``, for ``learned``.
        seed: Of every random choice.
        rank: Rows of a kept sample's factors.
        provenance: What else decides the masks, such as hashes of model and data; a file with other entries is refused.
        progress: Shows bars for work that lasts more than 3 s.

    Returns:
        By size.

    Raises:
        UsageError: An argument is out of range, a file holds other masks, or the gradients cannot be used.
    """
    shapes = find_layers(model, layers, include_head=include_head)
    counts = {stage: check_sides(stage.dims) for stage in files}
    given = {**provenance, "recipe": recipe, "rank_limit": str(rank), "head": str(include_head)}
    found: dict[StageSpec, StageMasks] = {}
    for stage, file in files.items():
        if file.exists():
            expected = {**given, "spec": str(stage), "method": method, "seed": str(seed)}
            found[stage] = StageMasks(load_masks(file, expect=expected, layers=shapes), True)
    missing = [stage for stage in files if stage not in found]
    if missing:
        options = {"recipe": recipe} if recipe != "default" else {}
        samples, n = collect(
            model,
            loss,
            loader,
            layers=layers,
            include_head=include_head,
            seed=seed,
            rank=rank,
            progress=progress,
        )
        for stage in missing:
            masks = choose(
                samples, n, counts[stage], method=method, seed=seed, provenance=given, progress=progress, **options
            )
            masks = _compared(masks, samples, counts[stage], seed)
            save_masks(files[stage], masks)
            found[stage] = StageMasks(masks, False)
    return {stage: found[stage] for stage in files}


def stage_files(
    folder: Path,
    stages: Iterable[StageSpec],
    *,
    method: str,
    recipe: str = "default",
    seed: int,
    provenance: Mapping[str, str],
) -> dict[StageSpec, Path]:
    """Names that tell masks of different origin apart, so that none is ever refused or written over.

    Args:
        folder: Where the files are.
        stages: Sizes.
        method: As in `fit_stages`.
        recipe: As in `fit_stages`.
        seed: As in `fit_stages`.
        provenance: As in `fit_stages`.
    """
    files = {}
    for stage in stages:
        facts = {**provenance, "recipe": recipe, "spec": str(stage), "method": method, "seed": str(seed)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        files[stage] = folder / f"{method}-{'x'.join(map(str, stage.dims))}-{digest}.safetensors"
    return files


def _compared(
    masks: Mapping[str, Mask], samples: Mapping[str, LayerSamples], k: tuple[int, int], seed: int
) -> dict[str, Mask]:
    """The masks with the facts that `StageMasks` lists."""
    noted: dict[str, Mask] = {}
    for name, layer in samples.items():
        counts = min(k[0], layer.shape.d_out), min(k[1], layer.shape.d_in)
        by_energy, at_random = energy_sides(layer, counts), random_sides(name, layer.shape, counts, seed)
        kept = masks[f"{name}/output"].indices, masks[f"{name}/input"].indices
        shared = {
            "kept_energy": f"{layer.kept_energy:.6f}",
            "held_out_correlation": f"{held_out_correlation(layer, kept):.6f}",
            "energy_correlation": f"{held_out_correlation(layer, by_energy):.6f}",
            "random_correlation": f"{held_out_correlation(layer, at_random):.6f}",
        }
        for place, side in enumerate(SIDES):
            facts = {
                **shared,
                "overlap_energy": f"{overlap(kept[place], by_energy[place]):.6f}",
                "overlap_random": f"{overlap(kept[place], at_random[place]):.6f}",
            }
            noted[f"{name}/{side}"] = with_facts(masks[f"{name}/{side}"], facts)
    return noted
