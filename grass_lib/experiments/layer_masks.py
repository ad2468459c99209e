"""Selective masks of an experiment's layers: fitted at the model that gradients are taken of, and kept in files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from grass_lib.attribution.model_hash import model_sha256
from grass_lib.gradients.layers import LayerChoice
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.masks.stages import StageMasks, fit_stages, stage_files
from grass_lib.project import runs_root
from grass_lib.specs import CompressionSpec, StageSpec

RANKS = {"embedded": 8, "paper": 64}
"""Rows of a sample's factors by scale; a block has 128 and 512 tokens."""


def masks_folder(experiment: str, scale: str) -> Path:
    """Where runs of a scale keep their masks, as ``Run.shared("masks")`` of a notebook says."""
    return runs_root() / "shared" / f"{experiment}-{scale}-masks"


def fit_layer_masks(
    model: nn.Module,
    loss: Output,
    train: Sequence[Batch],
    compressions: Iterable[CompressionSpec],
    folder: Path,
    *,
    layers: LayerChoice,
    include_head: bool,
    data_sha256: str,
    scale: str,
    method: str = "learned",
    seed: int = 0,
    progress: bool = True,
) -> dict[StageSpec, StageMasks]:
    """The masks that compressions need, from one pass over the training data; finished files are used again.

    Args:
        model: The trained model.
        loss: ``loss(model, batch) -> (batch,)``.
        train: Training batches.
        compressions: All compressions; those without a selective mask are passed over.
        folder: Where the files are; it is made.
        layers: As in `find_layers`.
        include_head: As in `find_layers`.
        data_sha256: Of the training data in this order.
        scale: ``embedded`` or ``paper``.
        method: One of `FACTORED_METHODS`.
        seed: Of every random choice.
        progress: Shows bars for work that lasts more than 3 s.

    Returns:
        By stage 1; empty where no compression needs a mask.

    Raises:
        UsageError: The method is none, or the gradients cannot be used.
    """
    stages = list(dict.fromkeys(spec.sparsification for spec in compressions if spec.sparsification.needs_mask_file))
    if not stages:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"model": model_sha256(model), "data": data_sha256}
    named = {**provenance, "rank_limit": str(RANKS[scale]), "head": str(include_head)}
    return fit_stages(
        model,
        loss,
        train,
        stage_files(folder, stages, method=method, seed=seed, provenance=named),
        layers=layers,
        include_head=include_head,
        method=method,
        seed=seed,
        rank=RANKS[scale],
        provenance=provenance,
        progress=progress,
    )
