"""Banks of the experiments: their plans, and the folder that each has to itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from grass_lib.errors import UsageError
from grass_lib.evaluation.plan import BankPlan
from grass_lib.evaluation.retraining import RetrainingBank, Trainer, train_bank


class BankSizes(Protocol):
    """What a protocol says of its banks."""

    @property
    def n_lds(self) -> int:
        """Models that LDS is measured on."""
        ...

    @property
    def second_seed_share(self) -> float:
        """Share of the LDS subsets trained with a second seed."""
        ...

    @property
    def group_size(self) -> int:
        """Models in the unit of resume."""
        ...


class TrakSizes(BankSizes, Protocol):
    """The same with models for TRAK."""

    @property
    def n_trak(self) -> int:
        """Models that TRAK uses."""
        ...


def check_models(n_lds: int, n_trak: int) -> None:
    """Refuses numbers of models that cannot work; 0 stands for the scale's own.

    Raises:
        UsageError: A number is negative, or LDS would have fewer than three models.
    """
    if n_lds < 0 or n_trak < 0 or n_lds in (1, 2):
        raise UsageError(
            f"n_lds is {n_lds} and n_trak {n_trak}; expected 0 for the scale's own numbers, or at least 3 LDS models "
            "and 1 TRAK model"
        )


def lds_plan(sizes: BankSizes, n_train: int, seed: int) -> BankPlan:
    """The models that LDS is measured on.

    Args:
        sizes: Of the protocol.
        n_train: Training samples.
        seed: Of subsets and models.
    """
    return BankPlan(
        n_train=n_train,
        n_models=sizes.n_lds,
        seed=seed,
        group_size=sizes.group_size,
        second_seed_share=sizes.second_seed_share,
    )


def trak_plan(sizes: TrakSizes, n_train: int, seed: int, *, role: str = "trak") -> BankPlan:
    """The models that TRAK uses; they share no random stream with those of another role.

    Args:
        sizes: Of the protocol.
        n_train: Training samples.
        seed: Of subsets and models.
        role: ``lds`` for the first models of the LDS bank instead.
    """
    return BankPlan(
        n_train=n_train,
        n_models=sizes.n_trak,
        seed=seed,
        group_size=sizes.group_size,
        second_seed_share=0.0,
        role=role,
    )


def bank_folder(directory: str | Path, plan: BankPlan, fingerprint: str) -> Path:
    """A bank's own folder, named after everything that decides its models.

    Args:
        directory: Where banks are kept.
        plan: Of the bank.
        fingerprint: Of recipe, model and data.
    """
    digest = hashlib.sha256(json.dumps([asdict(plan), fingerprint], sort_keys=True).encode()).hexdigest()
    return Path(directory) / f"{plan.role}-{digest[:12]}"


def trained_bank(
    plan: BankPlan,
    trainer: Trainer,
    directory: str | Path,
    *,
    fingerprint: str,
    keep_weights: bool = False,
    progress: bool = True,
) -> tuple[RetrainingBank, Path]:
    """A bank, trained where it is not there yet, and its folder.

    Args:
        plan: Of the bank.
        trainer: As for `train_bank`.
        directory: Where banks are kept.
        fingerprint: Of recipe, model and data.
        keep_weights: As for `train_bank`.
        progress: As for `train_bank`.

    Raises:
        BankError: See `train_bank`.
    """
    folder = bank_folder(directory, plan, fingerprint)
    found = train_bank(plan, trainer, folder, fingerprint=fingerprint, keep_weights=keep_weights, progress=progress)
    return found, folder
