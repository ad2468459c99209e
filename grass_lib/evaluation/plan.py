"""The plan of a retraining bank: which model is trained on which half, in which group, from which random streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.rng import Stream

ROLES = ("lds", "trak")


@dataclass(frozen=True)
class Member:
    """One model of a bank; everything random about it comes from streams of its name.

    Attributes:
        seed: The bank's seed.
        role: What the bank is for; models of different roles share no stream.
        index: Which subset.
        repeat: 0 for the first model of the subset, 1 for the one with the second seed.
    """

    seed: int
    role: str
    index: int
    repeat: int = 0

    @property
    def name(self) -> str:
        """``lds/12/0``: role, subset, repeat."""
        return f"{self.role}/{self.index}/{self.repeat}"

    def stream(self, stage: str) -> Stream:
        """The model's own stream for one purpose, for example ``init``, ``order`` or ``dropout``."""
        return Stream(self.seed, self.name, stage)

    @property
    def number(self) -> int:
        """A number below 2**63 that stands for the model's seed in tables: the start of its streams' key."""
        low, high = self.stream("model").key
        return (high & 0x7FFFFFFF) << 32 | low


@dataclass(frozen=True)
class BankPlan:
    """Subsets, seeds and groups of a bank, all derived from these few fields.

    Attributes:
        n_train: Samples in the training set.
        n_models: Subsets, each with one model at least.
        fraction: Share of the training set in each subset.
        seed: Of subsets and models.
        group_size: Models trained together: the unit of resume and of bit-identity.
        second_seed_share: Share of the subsets that get a second model with another seed, for the noise ceiling.
        role: ``"lds"`` for models that scores are measured on, ``"trak"`` for those that attribution uses. The two
            never share a random stream, so that their subsets are independent.

    Raises:
        UsageError: A field is out of range.
    """

    n_train: int
    n_models: int
    fraction: float = 0.5
    seed: int = 0
    group_size: int = 10
    second_seed_share: float = 0.5
    role: str = "lds"

    def __post_init__(self) -> None:
        for field in ("n_train", "n_models", "seed", "group_size"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or (field != "seed" and value < 1):
                raise UsageError(f"bank plan: {field} is {value!r}; expected a whole number, 1 or more (any for seed)")
        if self.role not in ROLES:
            raise UsageError(f"bank plan: role is {self.role!r}; expected one of {', '.join(ROLES)}")
        if not 0.0 < self.fraction < 1.0 or not 0 < self.subset_size < self.n_train:
            raise UsageError(
                f"bank plan: fraction {self.fraction} of {self.n_train} samples is {self.fraction * self.n_train:g}; "
                "expected a fraction between 0 and 1 that keeps some samples and leaves some out, for example 0.5"
            )
        if not 0.0 <= self.second_seed_share <= 1.0:
            raise UsageError(f"bank plan: second_seed_share is {self.second_seed_share}; expected 0 to 1")

    @property
    def subset_size(self) -> int:
        """Samples in each subset."""
        return round(self.fraction * self.n_train)

    @property
    def n_second(self) -> int:
        """Subsets with a second seed: the first so many."""
        return round(self.second_seed_share * self.n_models)

    def subset_indices(self, index: int) -> Tensor:
        """The samples of one subset: int64 ``(subset_size,)``, ascending."""
        return Stream(self.seed, f"{self.role}/{index}", "subset").distinct(self.subset_size, self.n_train)

    def subsets(self) -> Tensor:
        """All subsets as bool ``(n_models, n_train)``."""
        mask = torch.zeros((self.n_models, self.n_train), dtype=torch.bool)
        for index in range(self.n_models):
            mask[index, self.subset_indices(index)] = True
        return mask

    def groups(self) -> list[list[Member]]:
        """The models in the order of training, cut into groups; first seeds come first."""
        counts = (self.n_models, self.n_second)
        members = [Member(self.seed, self.role, i, repeat) for repeat, n in enumerate(counts) for i in range(n)]
        return [members[start : start + self.group_size] for start in range(0, len(members), self.group_size)]
