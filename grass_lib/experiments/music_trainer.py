"""Trains Music Transformers one after the other for a bank, on the event that follows each window."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.evaluation.group_store import TrainedGroup
from grass_lib.evaluation.plan import Member
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.windows import EventWindows
from grass_lib.experiments.models.music_transformer import MusicSizes, build_music_transformer, initial_weights
from grass_lib.experiments.reproducible import reproducible
from grass_lib.experiments.training import one_cpu_thread
from grass_lib.experiments.training_step import TrainingStep
from grass_lib.gradients.outputs import cross_entropy
from grass_lib.precision import exact_products
from grass_lib.rng import Stream

# Raised when the same recipe, data and streams would give other models.
_TRAINER_VERSION = 1
_QUERY_BATCH = 64


@dataclass(frozen=True)
class MusicRecipe:
    """How a model is trained: Adam at a constant rate on the mean cross-entropy of each batch, its order always new.

    Attributes:
        lr: Learning rate.
        betas: Of Adam.
        epochs: Passes over the subset.
        batch_size: Windows in a step; the last step of an epoch takes what is left.
        dropout: In [0, 1).

    Raises:
        UsageError: A value is out of range.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    epochs: int = 20
    batch_size: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not 0.0 <= self.dropout < 1.0 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UsageError(f"{self}: expected lr above 0, dropout and betas from 0 to below 1")
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError(f"{self}: expected epochs and batch_size of 1 or more")


class MusicTrainer:
    """Trains models of one architecture; see `grass_lib.evaluation.retraining.Trainer`.

    On a GPU matrix products are in bfloat16, weights and optimizer in float32, and a step is compiled and recorded
    once: models differ in the numbers copied into the same tensors. Everything is made when the first training begins,
    which may be never.
    """

    def __init__(
        self,
        data: EventWindows,
        sizes: MusicSizes,
        recipe: MusicRecipe,
        *,
        device: str = "auto",
        compile: bool | None = None,
    ) -> None:
        """Remembers what to do.

        Args:
            data: Training windows and queries.
            sizes: Of the model.
            recipe: How models are trained.
            device: Where to train; ``auto`` takes a GPU where there is one.
            compile: Compiles the pass; None does on a GPU.
        """
        self._data, self._sizes, self._recipe = data, sizes, recipe
        self._device = torch.device(resolve_device(device))
        self._compiled = compiles(device, compile)
        self._loop: _Loop | None = None

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        """Trains model i on the windows ``subsets[i]``.

        Args:
            subsets: int64 ``(g, subset_size)``.
            members: The models.

        Returns:
            Outputs ``(g, n_query)`` (log-probability of the event after each query, higher is better), weights, each
            model's mean query ``loss``, the share of queries whose event it ranks first as ``accuracy``, and its mean
            loss on its own training windows as ``train_loss``.
        """
        with one_cpu_thread():
            if self._loop is None:
                self._loop = _Loop(self._data, self._sizes, self._recipe, self._device, self._compiled)
            found = [self._loop.train(subset, member) for subset, member in zip(subsets, members, strict=True)]
        outputs, states, metrics = zip(*found, strict=True)
        columns = {name: torch.tensor([row[name] for row in metrics]) for name in metrics[0]}
        return TrainedGroup(torch.stack(outputs), list(states), columns)


class _Loop:
    """One module, compiled once, that is trained again and again."""

    def __init__(
        self, data: EventWindows, sizes: MusicSizes, recipe: MusicRecipe, device: torch.device, compiled: bool
    ) -> None:
        self._sizes, self._recipe, self._device = sizes, recipe, device
        self._model = build_music_transformer(sizes, recipe.dropout).to(device)
        # A window and the event after it in one row, as the recorded step wants it.
        self._train = torch.cat([data.train_ids, data.train_labels[:, None]], dim=1).to(device)
        self._queries = torch.cat([data.query_ids, data.query_labels[:, None]], dim=1).to(device)
        options: dict[str, Any] = {"force_shape_pad": True}
        loss: Any = torch.compile(mean_loss, dynamic=False, options=options) if compiled else mean_loss
        self._step = TrainingStep(
            self._model,
            loss,
            batch_size=recipe.batch_size,
            weight_decay=0.0,
            plain=mean_loss,
            betas=recipe.betas,
        )

    def train(self, subset: Tensor, member: Member) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
        """Outputs of the queries, weights and metrics of one model."""
        rows = self._train[subset.to(self._device)]
        self._fit(rows, initial_weights(self._sizes, member.stream("init")), member)
        outputs, right = self._log_probabilities(self._queries)
        fitted, _ = self._log_probabilities(rows)
        weights = {name: value.detach().to("cpu", copy=True) for name, value in self._model.state_dict().items()}
        metrics = {
            "loss": -float(outputs.mean()),
            "accuracy": float(right.float().mean()),
            "train_loss": -float(fitted.mean()),
        }
        return outputs, weights, metrics

    def _fit(self, rows: Tensor, start: Mapping[str, Tensor], member: Member) -> None:
        order, recipe = member.stream("order"), self._recipe
        low, high = member.stream("dropout").key
        self._model.train()
        try:
            with reproducible(self._device):
                self._step.restart(rows)
                with torch.no_grad():
                    for name, parameter in self._model.named_parameters():
                        parameter.copy_(start[name])
                torch.manual_seed((high & 0x7FFFFFFF) << 32 | low)
                for epoch in range(recipe.epochs):
                    for part in _order(order, len(rows), epoch).to(self._device).split(recipe.batch_size):
                        self._step(rows[part], recipe.lr)
        finally:
            self._model.eval()

    def _log_probabilities(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the event after each window, and whether no other event has a larger one; in float32, on the CPU."""
        with torch.inference_mode(), exact_products():
            logits = torch.cat([self._model(part[:, :-1]) for part in rows.split(_QUERY_BATCH)]).cpu()
        labels = rows[:, -1].cpu()
        return query_outputs(logits, labels), logits.argmax(dim=1) == labels


def mean_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the events after some windows.

    Args:
        model: The model, in any mode.
        rows: int64 ``(batch, length + 1)``: a window, then the event after it.
    """
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        return cross_entropy(model, (rows[:, :-1], rows[:, -1])).mean()


def query_outputs(logits: Tensor, labels: Tensor) -> Tensor:
    """What a bank keeps of each query, higher is better: the log-probability of the event after it.

    Args:
        logits: ``(n_query, VOCABULARY)``.
        labels: ``(n_query,)``.

    Returns:
        ``(n_query,)``.
    """
    return -functional.cross_entropy(logits.float(), labels, reduction="none")


def compiles(device: str, compile: bool | None) -> bool:
    """Whether the training pass is compiled: on a GPU, unless something else is asked for."""
    return torch.device(resolve_device(device)).type == "cuda" if compile is None else compile


def bank_fingerprint(
    sizes: MusicSizes, recipe: MusicRecipe, data: EventWindows, device: str, compile: bool | None
) -> str:
    """What decides the models of a bank besides its plan.

    Dropout is drawn by PyTorch's generators, whose numbers depend on the kind of device and on compilation.

    Args:
        sizes: Of the model.
        recipe: How it is trained.
        data: Windows.
        device: Where.
        compile: As in `MusicTrainer`.
    """
    content = {
        "model": asdict(sizes),
        "recipe": asdict(recipe),
        "data": data.sha256,
        "device": torch.device(resolve_device(device)).type,
        "compiled": compiles(device, compile),
        "trainer": _TRAINER_VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _order(stream: Stream, n: int, epoch: int) -> Tensor:
    return stream.permutation(n, index=epoch)
