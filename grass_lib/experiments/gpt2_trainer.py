"""Trains GPT-2: from scratch, and model by model for a bank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.errors import UsageError
from grass_lib.evaluation.group_store import TrainedGroup
from grass_lib.evaluation.plan import Member
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.blocks import TextBlocks
from grass_lib.experiments.models.gpt2 import GPT2Sizes, build_gpt2, initial_weights, load_weights, weights_of
from grass_lib.experiments.reproducible import reproducible
from grass_lib.experiments.training import one_cpu_thread
from grass_lib.experiments.training_step import TrainingStep
from grass_lib.gradients.language import causal_loss, log_odds
from grass_lib.precision import exact_products
from grass_lib.rng import Stream

# Raised when the same recipe, data and streams would give other models.
_TRAINER_VERSION = 3
_QUERY_BATCH = 16


@dataclass(frozen=True)
class TextRecipe:
    """How a language model is trained: AdamW on the mean cross-entropy of each batch.

    Attributes:
        lr: Highest learning rate.
        epochs: Passes over the blocks.
        batch_size: Blocks in a step; the last step of an epoch takes what is left.
        schedule: ``linear`` or ``cosine``: how the rate falls to 0 after the warm-up.
        warmup: Share of all steps in which the rate rises from 0.
        reshuffle: Another order in every epoch; else the order drawn once.
        dropout: In [0, 1).
        weight_decay: Of AdamW.

    Raises:
        UsageError: A value is out of range.
    """

    lr: float = 5e-5
    epochs: int = 3
    batch_size: int = 8
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: float = 0.0
    reshuffle: bool = False
    dropout: float = 0.1
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not 0.0 <= self.warmup < 1.0 or not 0.0 <= self.dropout < 1.0 or self.weight_decay < 0:
            raise UsageError(f"{self}: expected lr above 0, warmup and dropout from 0 to below 1, no negative decay")
        if self.epochs < 1 or self.batch_size < 1 or self.schedule not in ("linear", "cosine"):
            raise UsageError(f"{self}: expected epochs and batch_size of 1 or more, schedule linear or cosine")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one step.

        Args:
            step: Which, from 0.
            steps: All of them.
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return self.lr * step / rising
        done = (step - rising) / max(1, steps - rising)
        if self.schedule == "linear":
            return self.lr * (1.0 - done)
        return self.lr * 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))

    def orders(self, stream: Stream, n: int) -> Tensor:
        """The order of samples, int64 ``(epochs, n)``, each row a permutation.

        Args:
            stream: The model's own stream.
            n: Samples.
        """
        drawn = [stream.permutation(n, index=epoch if self.reshuffle else 0) for epoch in range(self.epochs)]
        return torch.stack(drawn)


class TextTrainer:
    """Trains models of one architecture one after the other; see `grass_lib.evaluation.retraining.Trainer`.

    On a GPU matrix products are in bfloat16, weights and optimizer in float32, and a step is compiled and recorded
    once: models differ in the numbers copied into the same tensors.
    """

    def __init__(
        self,
        data: TextBlocks,
        sizes: GPT2Sizes,
        base: Mapping[str, Tensor],
        recipe: TextRecipe,
        *,
        device: str = "auto",
        compile: bool | None = None,
    ) -> None:
        """Puts blocks and model on the device.

        Args:
            data: Training blocks and queries.
            sizes: Of the model.
            base: Weights that each training starts from.
            recipe: How models are trained.
            device: Where to train; ``auto`` takes a GPU where there is one.
            compile: Compiles the pass; None does on a GPU.
        """
        self._base = base
        self._base_loss: Tensor | None = None
        self._loop = TrainingLoop(sizes, recipe, device=device, compile=compile)
        self._train_ids = data.train_ids.to(self._loop.device)
        self._query_ids = data.query_ids.to(self._loop.device)

    def __call__(self, subsets: Tensor, members: Sequence[Member]) -> TrainedGroup:
        """Trains model i on the blocks ``subsets[i]``.

        Args:
            subsets: int64 ``(g, subset_size)``.
            members: The models.

        Returns:
            Outputs ``(g, n_query)`` (log-odds of the mean token, higher is better), weights, and each model's mean
            query loss as ``loss`` and ``perplexity``, that of the weights it started from as ``base_loss``.
        """
        outputs, states, losses = [], [], []
        with one_cpu_thread():
            if self._base_loss is None:
                load_weights(self._loop.model, self._base)
                self._base_loss = self._loop.query_losses(self._query_ids).mean()
            for subset, member in zip(subsets, members, strict=True):
                ids = self._train_ids[subset.to(self._train_ids.device)]
                self._loop.fit(self._base, ids, member.stream("order"), member.stream("dropout"))
                loss = self._loop.query_losses(self._query_ids)
                outputs.append(log_odds(loss))
                losses.append(loss.mean())
                states.append(weights_of(self._loop.model))
        loss = torch.stack(losses)
        metrics = {"loss": loss, "perplexity": loss.exp(), "base_loss": self._base_loss.expand(len(members)).clone()}
        return TrainedGroup(torch.stack(outputs), states, metrics)


class TrainingLoop:
    """One module, compiled once, that is trained again and again.

    Attributes:
        model: The module; its weights are those of the last training.
        device: Where it is.
        compiled: Whether the pass is compiled.
    """

    def __init__(
        self, sizes: GPT2Sizes, recipe: TextRecipe, *, device: str = "auto", compile: bool | None = None
    ) -> None:
        """Builds the module.

        Args:
            sizes: Of the model.
            recipe: How it is trained.
            device: Where.
            compile: Compiles the pass; None does on a GPU.
        """
        self.device = torch.device(resolve_device(device))
        self.compiled = compiles(device, compile)
        self.model: Any = build_gpt2(sizes, recipe.dropout).to(self.device)
        self._recipe = recipe
        # Deterministic kernels are not chosen by timing: without this, an odd vocabulary would get the slow ones.
        options: dict[str, Any] = {"force_shape_pad": True}
        loss: Any = torch.compile(_mean_loss, dynamic=False, options=options) if self.compiled else _mean_loss
        self._step = TrainingStep(
            self.model, loss, batch_size=recipe.batch_size, weight_decay=recipe.weight_decay, plain=_mean_loss
        )

    def fit(self, start: Mapping[str, Tensor], ids: Tensor, order: Stream, dropout: Stream, *, title: str = "") -> None:
        """Trains the module on some blocks.

        Args:
            start: Weights to start from.
            ids: Blocks, int64 ``(n, length)`` on the device.
            order: Stream of the order of blocks.
            dropout: Stream that seeds the generators of dropout.
            title: Of a bar that is shown when the training lasts; none where it is empty.
        """
        model, recipe = self.model, self._recipe
        orders = recipe.orders(order, len(ids)).to(self.device)
        batches = [part for epoch in orders for part in epoch.split(recipe.batch_size)]
        low, high = dropout.key
        model.train()
        try:
            with reproducible(self.device):
                self._step.restart(ids)
                load_weights(model, start)
                torch.manual_seed((high & 0x7FFFFFFF) << 32 | low)
                for step, rows in enumerate(tqdm(batches, desc=title, unit="step", delay=3, disable=not title)):
                    self._step(ids[rows], recipe.rate(step, len(batches)))
        finally:
            model.eval()

    def query_losses(self, ids: Tensor) -> Tensor:
        """Mean token cross-entropy of each block in evaluation mode and float32.

        Args:
            ids: int64 ``(n, length)`` on the device.

        Returns:
            ``(n,)`` on the CPU.
        """
        self.model.eval()
        with torch.inference_mode(), exact_products():
            found = [
                causal_loss(self.model, {"input_ids": part, "labels": part}, "mean") for part in ids.split(_QUERY_BATCH)
            ]
            return torch.cat(found).cpu()


def train_base(
    ids: Tensor,
    sizes: GPT2Sizes,
    recipe: TextRecipe,
    *,
    seed: int,
    device: str = "auto",
    compile: bool | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Trains a model from scratch.

    Args:
        ids: Blocks, int64 ``(n, length)``.
        sizes: Of the model.
        recipe: How.
        seed: Of initial weights, order and dropout.
        device: Where.
        compile: Compiles the pass; None does on a GPU.
        progress: Shows a bar when it lasts.

    Returns:
        The weights, on the CPU.
    """
    with one_cpu_thread():
        loop = TrainingLoop(sizes, recipe, device=device, compile=compile)
        start = initial_weights(sizes, Stream(seed, "base", "init"))
        order, dropout = Stream(seed, "base", "order"), Stream(seed, "base", "dropout")
        title = "training the base model" if progress else ""
        loop.fit(start, ids.to(loop.device), order, dropout, title=title)
        return weights_of(loop.model)


def compiles(device: str, compile: bool | None) -> bool:
    """Whether the training pass is compiled: on a GPU, unless something else is asked for."""
    return torch.device(resolve_device(device)).type == "cuda" if compile is None else compile


def training_fingerprint(
    sizes: GPT2Sizes, recipe: TextRecipe, data_sha256: str, start: str, device: str, compile: bool | None
) -> str:
    """What decides trained models besides the plan.

    Dropout is drawn by PyTorch's generators, whose numbers depend on the kind of device and on compilation.

    Args:
        sizes: Of the model.
        recipe: How it is trained.
        data_sha256: Of the blocks.
        start: Hash of the weights that training starts from, or what else decides them.
        device: Where.
        compile: As in `TextTrainer`.
    """
    content = {
        "model": asdict(sizes),
        "recipe": asdict(recipe),
        "data": data_sha256,
        "start": start,
        "device": torch.device(resolve_device(device)).type,
        "compiled": compiles(device, compile),
        "trainer": _TRAINER_VERSION,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights, their names and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _mean_loss(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return causal_loss(model, {"input_ids": ids, "labels": ids}, "mean").mean()
