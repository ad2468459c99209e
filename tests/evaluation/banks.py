"""A tiny trainer and banks for tests: linear regression by gradient steps, with noise from the member's own streams."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grass_lib.evaluation import BankPlan, Member, RetrainingBank, TrainedGroup, train_bank

N_TRAIN, N_QUERY, FEATURES = 40, 7, 5
PLAN = BankPlan(n_train=N_TRAIN, n_models=6, seed=3, group_size=2)
FINGERPRINT = "tiny recipe"


def tiny_data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``(40, 5)``, targets ``(40,)`` and queries ``(7, 5)``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_TRAIN, FEATURES, generator=generator)
    return (
        x,
        x.sum(dim=1) + torch.randn(N_TRAIN, generator=generator),
        torch.randn(N_QUERY, FEATURES, generator=generator),
    )


class TinyTrainer:
    """Counts its calls; calls ``before_group(n)`` before group n of this trainer."""

    def __init__(self, before_group=lambda n: None) -> None:
        self.trained: list[str] = []
        self.calls = 0
        self._before_group = before_group

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        self._before_group(self.calls)
        self.calls += 1
        self.trained += [member.name for member in members]
        x, y, queries = tiny_data()
        states = []
        for rows, member in zip(subsets, members, strict=True):
            w = member.stream("init").normal(FEATURES)
            for step in range(5):
                order = member.stream("order").permutation(len(rows), index=step)[:8]
                batch = rows[order]
                w = w - 0.1 * x[batch].T @ (x[batch] @ w - y[batch]) / len(batch)
            states.append({"w": w})
        outputs = torch.stack([-((queries @ state["w"]) ** 2) for state in states])
        return TrainedGroup(outputs, states, {"norm": torch.stack([state["w"].norm() for state in states])})


def tiny_bank(directory: Path, trainer: TinyTrainer | None = None, **options) -> RetrainingBank:
    """Trains the tiny bank."""
    options = {"fingerprint": FINGERPRINT, "progress": False, **options}
    return train_bank(options.pop("plan", PLAN), trainer or TinyTrainer(), directory, **options)


def random_bank(n_models: int = 12, n_train: int = 30, n_query: int = 5, seed: int = 0) -> RetrainingBank:
    """Outputs without structure, with ties."""
    plan = BankPlan(n_train=n_train, n_models=n_models, seed=seed)
    outputs = torch.randint(0, 8, (n_models, 2, n_query), generator=torch.Generator().manual_seed(seed)).double()
    return RetrainingBank(plan.subsets(), outputs)


if __name__ == "__main__":  # a process that a test kills: says when it is in the middle of a group, then waits there

    def wait(n: int) -> None:
        if n == int(sys.argv[2]):
            sys.stdout.write("in the middle\n")
            sys.stdout.flush()
            sys.stdin.read()

    tiny_bank(Path(sys.argv[1]), TinyTrainer(wait), keep_weights=True)
