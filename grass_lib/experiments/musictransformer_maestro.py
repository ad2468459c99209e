"""Music Transformer + MAESTRO (section 4.1 and the appendix's small-scale protocol): data, banks, protocol.

A window of events is asked for the event after it. Ground truth is the retrained models' log-probability of that event;
attribution linearises its margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.evaluation.plan import BankPlan
from grass_lib.evaluation.retraining import RetrainingBank, load_weights
from grass_lib.experiments.banks import lds_plan, trained_bank, trak_plan
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.chorales import chorales_fingerprint, load_chorales
from grass_lib.experiments.data.maestro import load_maestro
from grass_lib.experiments.data.maestro_archive import maestro_fingerprint, maestro_problems
from grass_lib.experiments.data.windows import EventWindows
from grass_lib.experiments.models.music_transformer import MusicTransformer, build_music_transformer
from grass_lib.experiments.music_masks import energy_masks
from grass_lib.experiments.music_protocol import Protocol, check_scale, protocol
from grass_lib.experiments.music_trainer import MusicTrainer, bank_fingerprint

GALLERY_LIMIT = 6
"""Query windows in the gallery."""


def load_data(protocol: Protocol) -> EventWindows:
    """The windows of a protocol.

    Raises:
        DataError: The data are missing, damaged or give too few windows.
    """
    if protocol.scale == "paper":
        return load_maestro()
    return load_chorales(length=protocol.sizes.length, n_train=protocol.n_train, n_query=protocol.n_query)


def make_model(protocol: Protocol) -> MusicTransformer:
    """The architecture in evaluation mode; its weights come from checkpoints."""
    return build_music_transformer(protocol.sizes, protocol.recipe.dropout)


def batches(ids: Tensor, labels: Tensor, batch_size: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Windows in a fixed order as a loader: a list of ``(ids, labels)`` batches without copies.

    Args:
        ids: int64 ``(n, length)``.
        labels: int64 ``(n,)``, the event after each window.
        batch_size: Windows in a batch; results do not depend on it.
    """
    return list(zip(ids.split(batch_size), labels.split(batch_size), strict=True))


def train_lds_bank(
    protocol: Protocol,
    data: EventWindows,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
    progress: bool = True,
) -> RetrainingBank:
    """Trains, or finishes, the bank that LDS is measured on.

    Args:
        protocol: Of the scale.
        data: Of the same protocol.
        directory: Where banks are kept, each in a folder of its own; a killed run goes on there.
        seed: Of subsets and models.
        device: Where to train.
        compile: Compiles the training pass; None does on a GPU.
        progress: Shows a bar when it lasts.

    Returns:
        The bank; ``bank.metrics`` has the models' mean query ``loss``, ``accuracy`` and ``train_loss``.

    Raises:
        BankError: See `train_bank`.
    """
    plan = lds_plan(protocol, len(data.train_labels), seed)
    return _train(plan, protocol, data, directory, device, compile, keep_weights=False, progress=progress)[0]


def trak_checkpoints(
    protocol: Protocol,
    data: EventWindows,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Trains, finishes or reads the models that TRAK uses.

    Args:
        protocol: Of the scale.
        data: Of the same protocol.
        directory: Where banks are kept, each in a folder of its own.
        seed: Of subsets and models; the same seed as the LDS bank's shares no stream with it.
        device: Where to train.
        compile: As for the bank.
        progress: Shows a bar when it lasts.

    Returns:
        One state dict of `make_model` per model, on the CPU.

    Raises:
        BankError: See `train_bank`.
    """
    plan = trak_plan(protocol, len(data.train_labels), seed)
    _, folder = _train(plan, protocol, data, directory, device, compile, keep_weights=True, progress=progress)
    return load_weights(folder)


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: By name, of the right types.

    Raises:
        UsageError: A value that cannot work, or data that cannot be had here.
    """
    chosen = protocol(
        scale, n_lds=parameters["n_lds_models"], n_trak=parameters["n_trak_models"], masks=parameters["masks"]
    )
    chosen.compressions(parameters["specs"])
    chosen.damping_grid(parameters["convention"])
    if not 0 <= parameters["gallery"] <= GALLERY_LIMIT:
        raise UsageError(f"gallery is {parameters['gallery']}; expected 0 to {GALLERY_LIMIT} query windows")
    resolve_device(parameters["device"])
    problems = _data_problems(scale)
    if problems:
        raise DataError(problems[0])


def check(scale: str) -> list[str]:
    """Why the experiment would not work here at a scale, one sentence each."""
    check_scale(scale)
    problems = _data_problems(scale)
    if scale == "paper" and not torch.cuda.is_available():
        problems = [*problems, "scale paper needs a CUDA GPU, and none is usable here; run it on a machine with one"]
    return problems


def data_fingerprint(scale: str) -> str:
    """A hash of the files behind a scale, without decoding them.

    Raises:
        UsageError: There is no such scale.
        DataError: A file is missing.
    """
    check_scale(scale)
    return chorales_fingerprint() if scale == "embedded" else maestro_fingerprint()


def _data_problems(scale: str) -> list[str]:
    if scale == "paper":
        return maestro_problems()
    try:
        chorales_fingerprint()
    except DataError as error:
        return [str(error)]
    return []


def _train(
    plan: BankPlan,
    protocol: Protocol,
    data: EventWindows,
    directory: str | Path,
    device: str,
    compile: bool | None,
    *,
    keep_weights: bool,
    progress: bool,
) -> tuple[RetrainingBank, Path]:
    """The bank and its own folder below ``directory``, named after everything that decides its models."""
    fingerprint = bank_fingerprint(protocol.sizes, protocol.recipe, data, device, compile)
    trainer = MusicTrainer(data, protocol.sizes, protocol.recipe, device=device, compile=compile)
    return trained_bank(plan, trainer, directory, fingerprint=fingerprint, keep_weights=keep_weights, progress=progress)


__all__ = [
    "Protocol",
    "batches",
    "check",
    "data_fingerprint",
    "energy_masks",
    "load_data",
    "make_model",
    "protocol",
    "train_lds_bank",
    "trak_checkpoints",
    "validate",
]
