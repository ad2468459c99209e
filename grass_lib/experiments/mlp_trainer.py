"""Trains the groups of a bank of MLPs on MNIST."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from grass_lib.evaluation.group_store import TrainedGroup
from grass_lib.evaluation.plan import Member
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.mnist import Digits
from grass_lib.experiments.models.mlp import HIDDEN, initial_weights, stacked_logits
from grass_lib.experiments.training import ModelStreams, Recipe, one_cpu_thread, train_stacked

Target: TypeAlias = Literal["loss", "margin"]
# Raised when the same recipe, data and streams would give other models.
_TRAINER_VERSION = 1


class GroupTrainer:
    """Trains groups of models of a bank; see `grass_lib.evaluation.retraining.Trainer`."""

    def __init__(self, data: Digits, recipe: Recipe, *, target: Target = "loss", device: str = "auto") -> None:
        """Puts the data on the device.

        Args:
            data: Training and query digits.
            recipe: How models are trained.
            target: Which output of the queries is kept.
            device: Where to train; ``auto`` takes a GPU where there is one.
        """
        self._device = torch.device(resolve_device(device))
        self._recipe = recipe
        self._target: Target = target
        moved = (data.train_x, data.train_y, data.query_x, data.query_y)
        self._train_x, self._train_y, self._query_x, self._query_y = (part.to(self._device) for part in moved)

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        """Trains model i on the digits ``subsets[i]``.

        Args:
            subsets: int64 ``(g, subset_size)``.
            members: The models.

        Returns:
            Outputs ``(g, n_query)``, weights, and the share of queries that each model gets right as ``accuracy``.
        """
        with one_cpu_thread():
            return self._train(subsets, members)

    def _train(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        states = [initial_weights(member.stream("init")) for member in members]
        stacked = {name: torch.stack([state[name] for state in states]).to(self._device) for name in states[0]}
        weights = train_stacked(
            stacked_logits,
            stacked,
            self._train_x,
            self._train_y,
            subsets,
            [ModelStreams(member.stream("order"), member.stream("dropout")) for member in members],
            self._recipe,
            HIDDEN,
        )
        with torch.no_grad():
            logits = stacked_logits(weights, self._query_x)
            accuracy = (logits.argmax(dim=2) == self._query_y).float().mean(dim=1)
            outputs = query_outputs(logits, self._query_y, self._target)
        weights = {name: value.cpu() for name, value in weights.items()}
        return TrainedGroup(
            outputs.cpu(),
            [{name: value[row].clone() for name, value in weights.items()} for row in range(len(members))],
            {"accuracy": accuracy.cpu()},
        )


def query_outputs(logits: Tensor, labels: Tensor, target: Target) -> Tensor:
    """What a bank keeps of each query, higher is better.

    Args:
        logits: ``(g, n_query, classes)``.
        labels: ``(n_query,)``.
        target: ``loss`` for the negated cross-entropy, ``margin`` for the label's logit minus the log-sum-exp of the
            others.

    Returns:
        ``(g, n_query)``.
    """
    index = labels.expand(len(logits), -1)[..., None]
    if target == "loss":
        return functional.log_softmax(logits, dim=2).gather(2, index).squeeze(2)
    others = logits.scatter(2, index, -torch.inf)
    return logits.gather(2, index).squeeze(2) - others.logsumexp(dim=2)


def bank_fingerprint(recipe: Recipe, data: Digits, target: Target) -> str:
    """What decides the models of a bank besides its plan: recipe, data, target and the version of the trainer."""
    content = {"model": "mlp", "recipe": asdict(recipe), "data": data.sha256, "target": target}
    text = json.dumps({**content, "trainer": _TRAINER_VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
