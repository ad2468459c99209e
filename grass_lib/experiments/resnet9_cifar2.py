"""ResNet-9 + CIFAR-2 (section 4.1 and the appendix's small-scale protocol): data, banks and protocol at both scales.

Ground truth is the retrained models' negated cross-entropy for each query; attribution linearises the margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.evaluation.plan import BankPlan
from grass_lib.evaluation.retraining import RetrainingBank, load_weights
from grass_lib.experiments.banks import lds_plan, trained_bank, trak_plan
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data import cifar2
from grass_lib.experiments.data.cifar2 import Photos, data_problems, load_cifar2
from grass_lib.experiments.models.resnet9 import ResNet9
from grass_lib.experiments.resnet9_protocol import Protocol, protocol
from grass_lib.experiments.resnet9_trainer import GroupTrainer, bank_fingerprint

GALLERY_LIMIT = 6
"""Queries in the gallery, so that a page shows at most 60 thumbnails."""


def load_data(scale: str, data: str = "") -> Photos:
    """The images of a scale; see `load_cifar2`."""
    return load_cifar2(scale, data)


def make_model(protocol: Protocol) -> ResNet9:
    """The architecture; its weights come from checkpoints."""
    return ResNet9(protocol.sizes)


def batches(x: Tensor, y: Tensor, batch_size: int = 100) -> list[tuple[Tensor, Tensor]]:
    """Data in a fixed order as a loader: a list of ``(x, y)`` batches without copies.

    Args:
        x: ``(n, 3, 32, 32)``.
        y: ``(n,)``.
        batch_size: Samples in a batch; results do not depend on it.
    """
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def train_lds_bank(
    protocol: Protocol,
    data: Photos,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> RetrainingBank:
    """Trains, or finishes, the bank that LDS is measured on.

    Args:
        protocol: Of the scale.
        data: Of the same scale.
        directory: Where banks are kept, each in a folder of its own; a killed run goes on there.
        seed: Of subsets and models.
        device: Where to train.
        progress: Shows a bar when it lasts.

    Returns:
        The bank; ``bank.metrics["accuracy"]`` has the models' accuracy on the queries.

    Raises:
        BankError: See `train_bank`.
    """
    plan = lds_plan(protocol, len(data.train_y), seed)
    return _train(plan, protocol, data, directory, device, keep_weights=False, progress=progress)[0]


def trak_checkpoints(
    protocol: Protocol,
    data: Photos,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Trains, finishes or reads the models that TRAK uses.

    Args:
        protocol: Of the scale.
        data: Of the same scale.
        directory: Where banks are kept, each in a folder of its own.
        seed: Of subsets and models; the same seed as the LDS bank's shares no stream with it.
        device: Where to train.
        progress: Shows a bar when it lasts.

    Returns:
        One state dict of `make_model` per model, on the CPU.

    Raises:
        BankError: See `train_bank`.
    """
    plan = trak_plan(protocol, len(data.train_y), seed)
    _, folder = _train(plan, protocol, data, directory, device, keep_weights=True, progress=progress)
    return load_weights(folder)


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: By name, of the right types.

    Raises:
        UsageError: A value that cannot work.
        DataError: The chosen data cannot be had here.
    """
    chosen = protocol(
        scale,
        recipe=parameters["recipe"],
        masks=parameters["masks"],
        n_lds=parameters["n_lds_models"],
        n_trak=parameters["n_trak_models"],
    )
    chosen.compressions(parameters["specs"])
    chosen.damping_grid(parameters["convention"])
    if not 0 <= parameters["gallery"] <= GALLERY_LIMIT:
        raise UsageError(f"gallery is {parameters['gallery']}; expected 0 to {GALLERY_LIMIT} queries")
    resolve_device(parameters["device"])
    # Raises where an extra is not installed; data that a scale needs are the business of `check`.
    if parameters["data"]:
        cifar2.data_fingerprint(scale, parameters["data"])


def check(scale: str) -> list[str]:
    """Why the experiment would not work here at a scale, one sentence each."""
    problems = data_problems(scale)
    if scale == "paper" and not torch.cuda.is_available():
        problems.append("scale paper needs a CUDA GPU, and none is usable here; run it on a machine with one")
    return problems


def data_fingerprint(scale: str) -> str:
    """A hash of the files behind a scale; see `cifar2.data_fingerprint`."""
    return cifar2.data_fingerprint(scale)


def _train(
    plan: BankPlan,
    protocol: Protocol,
    data: Photos,
    directory: str | Path,
    device: str,
    *,
    keep_weights: bool,
    progress: bool,
) -> tuple[RetrainingBank, Path]:
    """The bank and its own folder below ``directory``, named after everything that decides its models."""
    fingerprint = bank_fingerprint(protocol.recipe, protocol.sizes, data, protocol.target)
    trainer = GroupTrainer(data, protocol.recipe, protocol.sizes, target=protocol.target, device=device)
    return trained_bank(plan, trainer, directory, fingerprint=fingerprint, keep_weights=keep_weights, progress=progress)


__all__ = [
    "Protocol",
    "batches",
    "check",
    "data_fingerprint",
    "load_data",
    "make_model",
    "protocol",
    "train_lds_bank",
    "trak_checkpoints",
    "validate",
]
