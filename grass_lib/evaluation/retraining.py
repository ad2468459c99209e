"""Retraining banks: models trained on random halves of the training set, the ground truth that LDS measures against.

A bank is planned once, trained in fixed groups and kept on disk as it grows; a run that is killed goes on with the
first missing group and ends with the same bank, bit for bit on one type of device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.errors import BankError, UsageError
from grass_lib.evaluation.bank_files import bank_lock
from grass_lib.evaluation.group_store import GroupStore, TrainedGroup
from grass_lib.evaluation.plan import BankPlan, Member

# A model trained again on another device or version may differ from the stored one by so much of the outputs' spread.
_SAME_MODEL = 0.05


class Trainer(Protocol):
    """Trains one group of models."""

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        """Trains model i on the samples ``subsets[i]``, with all its randomness from streams of ``members[i]``.

        Args:
            subsets: int64 ``(g, subset_size)``.
            members: The models, in the same order.

        Returns:
            Outputs ``(g, n_query)`` and the weights.
        """
        ...


@dataclass(frozen=True, eq=False)
class RetrainingBank:
    """Per-query outputs of models that were trained on known subsets.

    Attributes:
        subsets: bool ``(n_models, n_train)``.
        outputs: float ``(n_models, n_seeds, n_query)``, higher is better; NaN where a subset has no second seed.
        seeds: int64 ``(n_models, n_seeds)``, the number of each model's random streams; -1 where there is no model.
        metrics: Further values by name, ``(n_models, n_seeds)`` each, for example ``accuracy``.

    Raises:
        UsageError: The shapes do not fit, or a first-seed output is not finite.
    """

    subsets: Tensor
    outputs: Tensor
    seeds: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fits = self.subsets.dim() == 2 and self.outputs.dim() == 3 and len(self.subsets) == len(self.outputs)
        if not fits or self.subsets.dtype != torch.bool or not self.outputs.is_floating_point():
            raise UsageError(
                f"bank: subsets are {self.subsets.dtype} {tuple(self.subsets.shape)}, outputs {self.outputs.dtype} "
                f"{tuple(self.outputs.shape)}; expected bool (n_models, n_train) and float (n_models, n_seeds, n_query)"
            )
        if not self.n_models or not self.outputs.shape[1] or not self.n_query:
            raise UsageError(f"bank: outputs have shape {tuple(self.outputs.shape)}; expected 1 or more of each")
        if not bool(self.outputs[:, 0].isfinite().all()):
            raise UsageError(
                "bank: some outputs of the first seed are not finite; expected finite numbers for every model"
            )

    @property
    def n_models(self) -> int:
        """Subsets, each with one model at least."""
        return len(self.outputs)

    @property
    def n_train(self) -> int:
        """Samples in the training set."""
        return self.subsets.shape[1]

    @property
    def n_query(self) -> int:
        """Queries with outputs."""
        return self.outputs.shape[2]

    @classmethod
    def load(cls, directory: str | Path) -> RetrainingBank:
        """Reads a finished bank and checks every file of it.

        Args:
            directory: Where `train_bank` wrote it.

        Raises:
            BankError: Something is missing, damaged or of another bank.
        """
        return _assemble(GroupStore.existing(Path(directory)))


def train_bank(
    plan: BankPlan,
    trainer: Trainer,
    directory: str | Path,
    *,
    fingerprint: str,
    keep_weights: bool = False,
    progress: bool = True,
) -> RetrainingBank:
    """Trains a bank, or what is missing of it.

    Args:
        plan: Subsets, seeds and groups.
        trainer: Trains one group.
        directory: Where the bank is kept; made when it is not there. Another process that trains it is waited for.
        fingerprint: Of everything that decides what the trainer does: recipe, model, data. A bank of another
            fingerprint is refused.
        keep_weights: Keeps the models' weights too (see `load_weights`). Weights that are missing from a finished group
            are trained again from the same streams, and the outputs must then agree with those stored.
        progress: Shows a bar when the training lasts more than 3 s.

    Returns:
        The finished bank.

    Raises:
        UsageError: The trainer returned no `TrainedGroup`.
        BankError: The folder holds another bank, a file is damaged or cannot be written, training diverged, or a model
            that was trained again is not the one whose outputs are stored.
    """
    store = GroupStore(Path(directory), plan, fingerprint)
    store.make_folder()
    with bank_lock(store.folder):
        store.open()
        _train_missing(store, trainer, keep_weights=keep_weights, progress=progress)
    return _assemble(store)


def load_weights(directory: str | Path) -> list[dict[str, Tensor]]:
    """Weights of the first-seed models of a finished bank.

    Args:
        directory: Where `train_bank` wrote it, with ``keep_weights=True``.

    Returns:
        One state dict per subset, in order, on the CPU.

    Raises:
        BankError: Weights are missing or damaged.
    """
    store = GroupStore.existing(Path(directory))
    states: dict[int, dict[str, Tensor]] = {}
    for number, members in enumerate(store.plan.groups()):
        found = store.read_weights(number)
        if found is None:
            raise BankError(
                f"{directory} has no complete weights of group {number}; train the bank with keep_weights=True, only "
                "the missing models are trained again"
            )
        states.update({member.index: state for member, state in zip(members, found, strict=True) if not member.repeat})
    return [states[index] for index in range(store.plan.n_models)]


def _train_missing(store: GroupStore, trainer: Trainer, *, keep_weights: bool, progress: bool) -> None:
    """Trains and stores what `train_bank` still lacks."""
    plan, groups = store.plan, store.plan.groups()
    # All groups are read before any is trained, so that a damaged file is reported at once.
    stored = [store.read(number) for number in range(len(groups))]
    missing = [
        number
        for number, group in enumerate(stored)
        if group is None or (keep_weights and store.read_weights(number) is None)
    ]
    total = sum(map(len, groups))
    done = total - sum(len(groups[number]) for number in missing)
    with tqdm(
        total=total, initial=done, desc=f"training {plan.role} models", unit="model", delay=3, disable=not progress
    ) as bar:
        for number in missing:
            members = groups[number]
            subsets = torch.stack([plan.subset_indices(member.index) for member in members])
            trained = trainer(subsets, members)
            _check_trained(trained, members, keep_weights)
            before = stored[number]
            if before is not None:
                _check_same(before, trained, members)
            if keep_weights and trained.state_dicts is not None:
                store.write_weights(number, trained.state_dicts)
            if before is None:
                store.write(number, trained)
            bar.update(len(members))


def _assemble(store: GroupStore) -> RetrainingBank:
    """The bank of a store whose groups are all there."""
    plan, groups = store.plan, store.plan.groups()
    shape = (plan.n_models, 2 if plan.n_second else 1)
    outputs: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    seeds = torch.full(shape, -1, dtype=torch.int64)
    for number, members in enumerate(groups):
        group = store.read(number)
        if group is None:
            raise BankError(
                f"{store.folder} lacks group {number} of {len(groups)}; expected a finished bank. Run the training "
                "again: only missing groups are trained"
            )
        if outputs is None:
            outputs = torch.full((*shape, group.outputs.shape[1]), torch.nan, dtype=group.outputs.dtype)
        for row, member in enumerate(members):
            place = (member.index, member.repeat)
            outputs[place] = group.outputs[row]
            seeds[place] = member.number
            for name, values in group.metrics.items():
                metrics.setdefault(name, torch.full(shape, torch.nan))[place] = values[row].to(torch.float32)
    if outputs is None:
        raise BankError(f"{store.folder} has no groups; expected one or more")
    return RetrainingBank(plan.subsets(), outputs, seeds, metrics)


def _check_trained(trained: TrainedGroup, members: Sequence[Member], keep_weights: bool) -> None:
    """Refuses what must not be stored."""
    if not isinstance(trained, TrainedGroup) or not isinstance(trained.outputs, Tensor):
        seen = f"a {type(trained).__name__}"
        if isinstance(trained, TrainedGroup):
            seen += f" whose outputs are a {type(trained.outputs).__name__}"
        raise UsageError(
            f"the trainer returned {seen}; expected a grass_lib.evaluation.TrainedGroup, for example "
            "TrainedGroup(outputs) with a tensor of outputs (n_models, n_query)"
        )
    outputs = trained.outputs
    if outputs.dim() != 2 or len(outputs) != len(members):
        raise BankError(
            f"the trainer returned outputs {tuple(outputs.shape)} for {len(members)} models; expected (n_models, "
            "n_query)"
        )
    broken = [member.name for member, row in zip(members, outputs, strict=True) if not bool(row.isfinite().all())]
    if broken:
        raise BankError(
            f"training of {', '.join(broken)} gave outputs that are not finite; expected finite numbers. Nothing of "
            "this group was stored; a smaller learning rate usually helps"
        )
    if keep_weights and (trained.state_dicts is None or len(trained.state_dicts) != len(members)):
        raise BankError(
            f"the trainer returned no weights for {len(members)} models; expected one state dict per model, because "
            "keep_weights is on"
        )


def _check_same(stored: TrainedGroup, trained: TrainedGroup, members: Sequence[Member]) -> None:
    """Refuses weights that are not those of the models whose outputs are stored."""
    first, second = stored.outputs.double(), trained.outputs.detach().cpu().double()
    if first.shape == second.shape:
        distance = (first - second).square().mean(dim=1).sqrt() / first.std(dim=1, correction=0).clamp_min(1e-12)
        worst = int(distance.argmax())
        if float(distance[worst]) <= _SAME_MODEL:
            return
        detail = f"{members[worst].name} differs by {float(distance[worst]):.3f} of the outputs' spread"
    else:
        detail = f"outputs have shape {tuple(second.shape)}, stored {tuple(first.shape)}"
    raise BankError(
        f"models that were trained again for their weights are not those whose outputs are stored: {detail}, expected "
        f"at most {_SAME_MODEL}. The training code or its libraries have changed; delete the bank's folder to train it "
        "again"
    )
