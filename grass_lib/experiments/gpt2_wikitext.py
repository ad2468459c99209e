"""GPT-2 small + WikiText-2 (section 4.2 of the paper): data, bank, checkpoint and protocol at both scales.

Ground truth is the fine-tuned models' log-odds of each query block's mean token; influence functions are computed at
the first of those models.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.base import AttributionTask, resolve_device
from grass_lib.experiments.data import wikitext
from grass_lib.experiments.data.blocks import TextBlocks, blocks_hash
from grass_lib.experiments.data.tokenizers import tokenizer_fingerprint, tokenizer_problems
from grass_lib.experiments.data.wikipedia import articles_fingerprint, load_article_blocks
from grass_lib.experiments.gpt2_banks import attribution_checkpoint, base_weights, train_lds_bank
from grass_lib.experiments.gpt2_protocol import WIKIPEDIA, Protocol, check_scale, protocol
from grass_lib.experiments.layer_masks import fit_layer_masks
from grass_lib.experiments.models.gpt2 import build_gpt2, load_weights, pretrained_problems
from grass_lib.gradients.language import causal_loss, causal_margin
from grass_lib.masks import FACTORED_METHODS
from grass_lib.masks.stages import StageMasks
from grass_lib.project import runs_root
from grass_lib.specs import CompressionSpec, StageSpec, parse_hessian
from grass_lib.store.formats import DTYPES

GALLERY_LIMIT = 6
"""Queries in the gallery, so that a page shows at most 60 excerpts."""
LAYERS = "linear"
"""Layers that gradients are taken of: every linear layer but the tied output layer."""


def load_data(protocol: Protocol) -> TextBlocks:
    """The blocks of a protocol.

    Raises:
        DataError: The data are missing, damaged or give too few blocks.
    """
    if protocol.data != WIKIPEDIA:
        return wikitext.load_wikitext(protocol.data)
    return load_article_blocks(
        length=protocol.length,
        vocabulary=protocol.sizes.vocabulary,
        n_base=protocol.n_base,
        n_train=protocol.n_train,
        n_query=protocol.n_query,
    )


def batches(ids: Tensor, batch_size: int = 32) -> list[dict[str, Tensor]]:
    """Blocks in a fixed order as a loader: a list of batches without copies, the labels being the inputs.

    Args:
        ids: int64 ``(n, length)``.
        batch_size: Blocks in a batch; results do not depend on it.
    """
    return [{"input_ids": part, "labels": part} for part in ids.split(batch_size)]


def make_model(protocol: Protocol, weights: Mapping[str, Tensor] | None = None, device: str = "cpu") -> Any:
    """A ``GPT2LMHeadModel`` in evaluation mode.

    Args:
        protocol: Of the scale.
        weights: From `attribution_checkpoint` or `base_weights`; None leaves weights that mean nothing.
        device: Where to put it.
    """
    model = build_gpt2(protocol.sizes, protocol.recipe.dropout)
    if weights is not None:
        load_weights(model, weights)
    return model.to(resolve_device(device))


def fit_masks(
    model: Any,
    data: TextBlocks,
    compressions: Iterable[CompressionSpec],
    folder: str | Path,
    *,
    scale: str,
    method: str = "learned",
    include_head: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[StageSpec, StageMasks]:
    """The masks that selective compressions need, by their stage 1; see `fit_layer_masks`.

    Args:
        model: From `make_model`, trained.
        data: Of the same protocol.
        compressions: All compressions.
        folder: Where masks are kept.
        scale: ``embedded`` or ``paper``.
        method: One of `FACTORED_METHODS`.
        include_head: Whether the output layer has masks too.
        seed: Of every random choice.
        batch_size: Blocks in a pass.
        progress: Shows bars when it lasts more than 3 s.
    """
    return fit_layer_masks(
        model,
        causal_loss,
        batches(data.train_ids, batch_size),
        compressions,
        Path(folder),
        layers=LAYERS,
        include_head=include_head,
        data_sha256=blocks_hash(data.train_ids),
        scale=scale,
        method=method,
        seed=seed,
        progress=progress,
    )


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: By name, of the right types.

    Raises:
        UsageError: A value that cannot work, or data and weights that cannot be had here.
    """
    chosen = _protocol_of(scale, parameters)
    chosen.compressions(parameters["specs"])
    parse_hessian(parameters["hessian"])
    if parameters["dtype"] not in DTYPES:
        raise UsageError(f"dtype is {parameters['dtype']!r}; expected one of {', '.join(DTYPES)}")
    if parameters["masks"] not in FACTORED_METHODS:
        raise UsageError(f"masks is {parameters['masks']!r}; expected one of {', '.join(FACTORED_METHODS)}")
    if parameters["batch_size"] < 1:
        raise UsageError(f"batch_size is {parameters['batch_size']}; expected 1 or more blocks")
    if not 0 <= parameters["gallery"] <= GALLERY_LIMIT:
        raise UsageError(f"gallery is {parameters['gallery']}; expected 0 to {GALLERY_LIMIT} queries")
    resolve_device(parameters["device"])
    problems = _problems(chosen)
    if problems:
        raise DataError(problems[0])


def check(scale: str) -> list[str]:
    """Why no run of the experiment would work here at a scale, one sentence each.

    A run that needs what is not here, such as the pretrained weights, is refused by `validate`.
    """
    check_scale(scale)
    if scale == "embedded":
        return _problems(protocol(scale))
    runs = [protocol(scale, data=data, base="scratch") for data in wikitext.CHOICES]
    found = [_problems(run) for run in runs]
    problems = [] if not all(found) else found[0]
    if not torch.cuda.is_available():
        problems = [*problems, "scale paper needs a CUDA GPU, and none is usable here; run it on a machine with one"]
    return problems


def data_fingerprint(scale: str) -> str:
    """A hash of the files behind a scale, without cutting them into blocks; the hub's copies have their names.

    Raises:
        UsageError: There is no such scale.
        DataError: A file is missing.
    """
    check_scale(scale)
    if scale == "embedded":
        return articles_fingerprint()
    parts = [wikitext.wikitext_fingerprint(), tokenizer_fingerprint()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def task(scale: str, parameters: Mapping[str, Any], device: str, progress: bool = True) -> AttributionTask:
    """What caching and querying need: the first model of the LDS bank, trained where it is missing.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: Of the notebook; those that are not given have the scale's own values.
        device: Where the model goes.
        progress: Whether bars are shown.

    Raises:
        UsageError: A parameter cannot work.
        DataError: Data or pretrained weights cannot be had.
        BankError: See `attribution_checkpoint`.
    """
    chosen = _protocol_of(scale, parameters)
    seed, batch_size = int(parameters.get("seed", 0)), int(parameters.get("batch_size", 0)) or 32
    head = bool(parameters.get("head", False))
    data = load_data(chosen)
    weights = attribution_checkpoint(chosen, data, networks_folder(scale), seed=seed, device=device, progress=progress)

    def encode(text: str) -> dict[str, Tensor]:
        ids = data.tokenizer.encode(text)[: chosen.length]
        if len(ids) < 2:
            raise UsageError(f"the prompt {text!r} has {len(ids)} tokens; expected 2 or more, each predicts the next")
        row = torch.tensor([ids], dtype=torch.int64)
        return {"input_ids": row, "labels": row}

    def tokens(text: str) -> tuple[int, int]:
        count = len(data.tokenizer.encode(text))
        return count, min(count, chosen.length)

    return AttributionTask(
        model=make_model(chosen, weights, device),
        loss=causal_loss,
        target=causal_margin,
        layers=LAYERS,
        include_head=head,
        train=batches(data.train_ids, batch_size),
        n_train=len(data.train_ids),
        data_sha256=blocks_hash(data.train_ids),
        encode=encode,
        passage=data.passage,
        tokens=tokens,
        parameters={
            "seed": seed,
            "data": parameters.get("data", wikitext.OFFICIAL),
            "base": parameters.get("base", "pretrained"),
            "n_lds_models": int(parameters.get("n_lds_models", 0)),
            "batch_size": batch_size,
            "head": head,
        },
    )


def networks_folder(scale: str) -> Path:
    """Where runs of a scale keep their networks, as ``Run.shared("networks")`` of the notebook says."""
    return runs_root() / "shared" / f"gpt2_wikitext-{scale}-networks"


def _protocol_of(scale: str, parameters: Mapping[str, Any]) -> Protocol:
    return protocol(
        scale,
        n_lds=int(parameters.get("n_lds_models", 0)),
        data=parameters.get("data", wikitext.OFFICIAL),
        base=parameters.get("base", "pretrained"),
    )


def _problems(chosen: Protocol) -> list[str]:
    """What keeps data or weights of a protocol from being had here; asks nothing of the network."""
    missing = [name for name in ("transformers", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        return [f"GPT-2 needs {' and '.join(missing)}, not installed here; run `make setup`"]
    try:
        if chosen.data == WIKIPEDIA:
            articles_fingerprint()
            return []
        problems = [*wikitext.wikitext_problems(chosen.data), *tokenizer_problems()]
        return problems if chosen.base == "scratch" else [*problems, *pretrained_problems()]
    except DataError as error:
        return [str(error)]


__all__ = [
    "Protocol",
    "attribution_checkpoint",
    "base_weights",
    "batches",
    "check",
    "data_fingerprint",
    "fit_masks",
    "load_data",
    "make_model",
    "networks_folder",
    "protocol",
    "task",
    "train_lds_bank",
    "validate",
]
