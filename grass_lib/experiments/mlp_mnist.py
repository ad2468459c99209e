"""MLP + MNIST (sections 4.1 and the appendix's small-scale protocol): data, banks and protocol at both scales.

Ground truth is the retrained models' negated cross-entropy for each query; attribution linearises the margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import SpecError, UsageError
from grass_lib.evaluation.plan import BankPlan
from grass_lib.evaluation.retraining import RetrainingBank, load_weights
from grass_lib.experiments.banks import check_models, lds_plan, trained_bank, trak_plan
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.mnist import SIZES, Digits, check_scale, data_fingerprint, data_problems, load_mnist
from grass_lib.experiments.mlp_trainer import GroupTrainer, Target, bank_fingerprint
from grass_lib.experiments.models.mlp import MLP, PARAMETERS
from grass_lib.experiments.training import Recipe
from grass_lib.specs import CompressionSpec, parse_specs

RELATIVE_DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
PAPER_DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 5e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Absolute values; 0.005 is among those that the published rows were chosen from."""


GALLERY_LIMIT = 6
"""Query digits in the gallery, so that a page shows at most 60 thumbnails."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, grids and recipe of one scale.

    Attributes:
        scale: ``embedded`` or ``paper``.
        n_train: Training digits.
        n_query: Query digits; a tenth of them chooses the damping.
        n_lds: Models that LDS is measured on.
        n_trak: Models that TRAK uses.
        second_seed_share: Share of the LDS subsets trained with a second seed.
        group_size: Models trained together.
        ks: Compressed sizes.
        dense_ks: Compressed sizes of the dense projections, which cost the most.
        families: Other types to compare.
        dense_families: Dense types to compare.
        dampings: Grid of relative damping.
        paper_dampings: Grid of absolute damping, for ``convention="paper"``.
        recipe: How models are trained.
        target: Ground truth: ``loss`` is the negated cross-entropy as in the reference, ``margin`` the margin.
    """

    scale: str
    n_train: int
    n_query: int
    n_lds: int
    n_trak: int
    second_seed_share: float
    group_size: int
    ks: tuple[int, ...]
    dense_ks: tuple[int, ...]
    families: tuple[str, ...]
    dense_families: tuple[str, ...]
    recipe: Recipe
    dampings: tuple[float, ...] = RELATIVE_DAMPINGS
    paper_dampings: tuple[float, ...] = PAPER_DAMPINGS
    target: Target = "loss"

    def specs(self, ks: Sequence[int] = ()) -> tuple[str, ...]:
        """The compressions to compare, type by type.

        Args:
            ks: Other compressed sizes for all types; empty for the scale's own.
        """
        return tuple(
            f"{family}-{k}"
            for families, own in ((self.families, self.ks), (self.dense_families, self.dense_ks))
            for family in families
            for k in (ks or own)
        )

    def damping_grid(self, convention: str) -> tuple[float, ...]:
        """The damping values to choose from.

        Args:
            convention: ``relative`` or ``paper``; see `TRAK`.

        Raises:
            UsageError: There is no such convention.
        """
        grids = {"relative": self.dampings, "paper": self.paper_dampings}
        if convention not in grids:
            raise UsageError(f"convention is {convention!r}; expected one of {', '.join(grids)}")
        return grids[convention]

    def compressions(self, specs: str = "") -> list[CompressionSpec]:
        """The compressions to compare, checked against the model, so that a wrong one fails before any training.

        Args:
            specs: Specs with commas between them; empty for the scale's own.

        Raises:
            SpecError: A spec cannot be parsed, is layer-wise, needs more coordinates than the model has, or a mask.
        """
        parsed = parse_specs(specs or self.specs())
        for spec in parsed:
            if spec.is_factored:
                raise SpecError(
                    f"{spec} is for layers, and this experiment compresses whole gradients; use a flat spec"
                )
            if spec.needs_mask_file:
                raise SpecError(
                    f"{spec} needs a fitted mask, and this experiment fits none; expected random_mask or grass, or "
                    "another experiment, such as resnet9_cifar2 with masks=energy"
                )
            first = spec.projection if spec.sparsification.is_identity else spec.sparsification
            first.check_input(PARAMETERS)
        return parsed


def protocol(scale: str, *, n_lds: int = 0, n_trak: int = 0, target: Target = "loss") -> Protocol:
    """The protocol of a scale.

    Args:
        scale: ``embedded`` (a CPU, two minutes, smaller than the paper) or ``paper`` (section 7.2's sizes).
        n_lds: Another number of LDS models; 0 for the scale's own.
        n_trak: Another number of TRAK models; 0 for the scale's own.
        target: Ground truth.

    Raises:
        UsageError: There is no such scale or target, or a number is negative.
    """
    check_scale(scale)
    check_models(n_lds, n_trak)
    if target not in ("loss", "margin"):
        raise UsageError(f"target is {target!r}; expected loss or margin")
    n_train, n_query = SIZES[scale]
    if scale == "embedded":
        chosen = Protocol(
            scale=scale,
            n_train=n_train,
            n_query=n_query,
            n_lds=30,
            n_trak=3,
            second_seed_share=0.5,
            group_size=10,
            ks=(256, 512, 1024),
            dense_ks=(256,),
            families=("random_mask", "sjlt", "fjlt", "grass"),
            dense_families=("normal", "rademacher"),
            recipe=Recipe(lr=0.05, epochs=15),
            target=target,
        )
    else:
        chosen = Protocol(
            scale=scale,
            n_train=n_train,
            n_query=n_query,
            n_lds=50,
            n_trak=10,
            second_seed_share=0.5,
            group_size=25,
            ks=(2048, 4096, 8192),
            dense_ks=(2048, 4096, 8192),
            families=("random_mask", "sjlt", "fjlt"),
            dense_families=("rademacher", "normal"),
            recipe=Recipe(),
            target=target,
        )
    return replace(chosen, n_lds=n_lds or chosen.n_lds, n_trak=n_trak or chosen.n_trak)


def load_data(scale: str) -> Digits:
    """The digits of a scale; see `load_mnist`."""
    return load_mnist(scale)


def make_model() -> MLP:
    """The architecture; its weights come from checkpoints."""
    return MLP()


def batches(x: Tensor, y: Tensor, batch_size: int = 500) -> list[tuple[Tensor, Tensor]]:
    """Data in a fixed order as a loader: a list of ``(x, y)`` batches without copies.

    Args:
        x: ``(n, 784)``.
        y: ``(n,)``.
        batch_size: Samples in a batch; results do not depend on it.
    """
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def train_lds_bank(
    protocol: Protocol,
    data: Digits,
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
    data: Digits,
    directory: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    overlap: bool = False,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Trains, finishes or reads the models that TRAK uses.

    Args:
        protocol: Of the scale.
        data: Of the same scale.
        directory: Where banks are kept, each in a folder of its own.
        seed: Of subsets and models; the same seed as the LDS bank's shares no stream with it.
        device: Where to train.
        overlap: Takes the first models of the LDS bank instead (trained again from their streams), to measure what such
            a leak of the ground truth into attribution does to LDS.
        progress: Shows a bar when it lasts.

    Returns:
        One state dict of `make_model` per model, on the CPU.

    Raises:
        BankError: See `train_bank`.
    """
    plan = trak_plan(protocol, len(data.train_y), seed, role="lds" if overlap else "trak")
    _, folder = _train(plan, protocol, data, directory, device, keep_weights=True, progress=progress)
    return load_weights(folder)


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: By name, of the right types.

    Raises:
        UsageError: A value that cannot work.
    """
    chosen = protocol(scale, n_lds=parameters["n_lds_models"], n_trak=parameters["n_trak_models"])
    chosen.compressions(parameters["specs"])
    chosen.damping_grid(parameters["convention"])
    if not 0 <= parameters["gallery"] <= GALLERY_LIMIT:
        raise UsageError(f"gallery is {parameters['gallery']}; expected 0 to {GALLERY_LIMIT} query digits")
    resolve_device(parameters["device"])


def check(scale: str) -> list[str]:
    """Why the experiment would not work here at a scale, one sentence each."""
    problems = data_problems(scale)
    if scale == "paper" and not torch.cuda.is_available():
        problems.append("scale paper needs a CUDA GPU, and none is usable here; run it on a machine with one")
    return problems


def _train(
    plan: BankPlan,
    protocol: Protocol,
    data: Digits,
    directory: str | Path,
    device: str,
    *,
    keep_weights: bool,
    progress: bool,
) -> tuple[RetrainingBank, Path]:
    """The bank and its own folder below ``directory``, named after everything that decides its models."""
    fingerprint = bank_fingerprint(protocol.recipe, data, protocol.target)
    trainer = GroupTrainer(data, protocol.recipe, target=protocol.target, device=device)
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
