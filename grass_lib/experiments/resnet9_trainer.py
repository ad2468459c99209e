"""Trains the groups of a bank of ResNet-9s on two classes of images, one model after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.evaluation.group_store import TrainedGroup
from grass_lib.evaluation.plan import Member
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.cifar2 import Photos
from grass_lib.experiments.mlp_trainer import Target, query_outputs
from grass_lib.experiments.models.resnet9 import ResNet9, ResNet9Sizes, initial_state, load_state, state_of
from grass_lib.experiments.sgd_step import SGDStep
from grass_lib.experiments.training import epoch_orders, one_cpu_thread

# Raised when the same recipe, data and streams would give other models.
_TRAINER_VERSION = 1
_QUERY_BATCH = 500


@dataclass(frozen=True)
class ImageRecipe:
    """How a network is trained: SGD with momentum on the mean cross-entropy of each batch, no augmentation, no decay.

    Attributes:
        lr: Learning rate, the highest one where it changes.
        epochs: Passes over the subset.
        momentum: Of SGD, in [0, 1).
        batch_size: Samples in a step; the last step of an epoch takes what is left.
        warm_up: Share of the steps in which the rate rises linearly from near 0 to ``lr``, before it falls linearly to
            near 0; 0 for a constant rate.

    Raises:
        UsageError: A value is out of range.
    """

    lr: float = 0.01
    epochs: int = 10
    momentum: float = 0.9
    batch_size: int = 64
    warm_up: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not 0.0 <= self.momentum < 1.0 or not 0.0 <= self.warm_up < 1.0:
            raise UsageError(f"{self}: expected lr above 0, and momentum and warm_up from 0 to below 1")
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError(f"{self}: expected epochs and batch_size of 1 or more")

    def rates(self, steps: int) -> list[float]:
        """The learning rate of every step.

        Args:
            steps: How many there are.
        """
        if not self.warm_up:
            return [self.lr] * steps
        peak = max(1.0, self.warm_up * steps)
        return [
            self.lr * ((step + 0.5) / peak if step + 0.5 < peak else (steps - step - 0.5) / max(1.0, steps - peak))
            for step in range(steps)
        ]


class GroupTrainer:
    """Trains groups of models of a bank; see `grass_lib.evaluation.retraining.Trainer`.

    A model depends on nothing but its own streams: not on its group, nor on the models trained before it.
    """

    def __init__(
        self,
        data: Photos,
        recipe: ImageRecipe,
        sizes: ResNet9Sizes,
        *,
        target: Target = "loss",
        device: str = "auto",
    ) -> None:
        """Puts the data and one model on the device.

        Args:
            data: Training and query images.
            recipe: How models are trained.
            sizes: Of the models.
            target: Which output of the queries is kept.
            device: Where to train; ``auto`` takes a GPU where there is one.
        """
        self._device = torch.device(resolve_device(device))
        self._recipe, self._sizes = recipe, sizes
        self._target: Target = target
        layout = _layout(self._device)
        self._train_x = data.train_x.to(self._device).contiguous(memory_format=layout)
        self._query_x = data.query_x.to(self._device).contiguous(memory_format=layout)
        self._train_y, self._query_y = data.train_y.to(self._device), data.query_y.to(self._device)
        self._model = ResNet9(sizes).to(self._device)
        self._model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        self._step = SGDStep(self._model, momentum=recipe.momentum)

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        """Trains model i on the images ``subsets[i]``.

        Args:
            subsets: int64 ``(g, subset_size)``.
            members: The models.

        Returns:
            Outputs ``(g, n_query)``, weights with the buffers of normalisation, and the share of queries that each
            model gets right as ``accuracy``.
        """
        outputs, accuracy, states = [], [], []
        with one_cpu_thread(), _repeatable():
            self._record(subsets.shape[1])
            for subset, member in zip(subsets.to(self._device), members, strict=True):
                self._train(subset, member)
                logits = self._logits(self._query_x)
                outputs.append(query_outputs(logits[None], self._query_y, self._target)[0].cpu())
                accuracy.append((logits.argmax(dim=1) == self._query_y).float().mean().cpu())
                states.append(state_of(self._model))
        return TrainedGroup(torch.stack(outputs), states, {"accuracy": torch.stack(accuracy)})

    def _record(self, size: int) -> None:
        """Has the step recorded for whole batches and for the last one of an epoch."""
        batch = self._recipe.batch_size
        sizes = {min(batch, size), size % batch} - {0}
        self._model.train()
        self._step.record(self._train_x, self._train_y, sorted(sizes))

    def _train(self, subset: Tensor, member: Member) -> None:
        recipe, size = self._recipe, len(subset)
        load_state(self._model, initial_state(self._sizes, member.stream("init"), self._device))
        self._model.train()
        self._step.restart()
        orders = epoch_orders(member.stream("order"), size, range(recipe.epochs), self._device)
        batches = [part for order in orders for part in subset[order].split(recipe.batch_size)]
        for rows, rate in zip(batches, recipe.rates(len(batches)), strict=True):
            self._step(self._train_x[rows], self._train_y[rows], rate)

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        self._model.eval()
        return torch.cat([self._model(part) for part in x.split(_QUERY_BATCH)])


def _layout(device: torch.device) -> torch.memory_format:
    """How images and weights lie in memory.

    A GPU is fastest where the channels of a pixel lie side by side. On a CPU that saves a tenth of the time, and
    oneDNN, as it comes with PyTorch 2.13, then writes out of bounds for models of 2 or 3 channels.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


@contextmanager
def _repeatable() -> Iterator[None]:
    """Convolutions of a GPU by algorithms that give the same bits every time, without trying which is fastest."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield


def bank_fingerprint(recipe: ImageRecipe, sizes: ResNet9Sizes, data: Photos, target: Target) -> str:
    """What decides the models of a bank besides its plan: sizes, recipe, data, target, the version of the trainer."""
    content = {
        "model": "resnet9",
        "sizes": asdict(sizes),
        "recipe": asdict(recipe),
        "data": data.sha256,
        "target": target,
        "trainer": _TRAINER_VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
