"""Training many small classifiers at once by SGD with momentum, each with its own data, order, dropout and weights.

Everything random is drawn from streams of a model's name and computed ahead in blocks of epochs, so that a step is a
few batched kernels and a model depends on its group only through rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.rng import Stream

StackedForward: TypeAlias = Callable[[Mapping[str, Tensor], Tensor, Tensor | None], Tensor]
# Bytes of dropout masks held at once; on a GPU fewer, larger blocks save launches.
_CPU_BLOCK, _CUDA_BLOCK = 32 * 2**20, 256 * 2**20


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: SGD with momentum on the mean cross-entropy of each batch.

    Attributes:
        lr: Learning rate.
        momentum: Of SGD, in [0, 1).
        epochs: Passes over the subset.
        batch_size: Samples in a step; the last step of an epoch takes what is left.
        dropout: Probability that a hidden unit is dropped, in [0, 1).

    Raises:
        UsageError: A value is out of range.
    """

    lr: float = 0.01
    momentum: float = 0.9
    epochs: int = 50
    batch_size: int = 64
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.lr > 0.0 or not 0.0 <= self.momentum < 1.0 or not 0.0 <= self.dropout < 1.0:
            raise UsageError(f"{self}: expected lr above 0, and momentum and dropout from 0 to below 1")
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError(f"{self}: expected epochs and batch_size of 1 or more")


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Limits PyTorch to one CPU thread, and restores the number.

    The kernels of a step last well under a millisecond. Two threads save little on an idle machine (measured: 0.45
    against 0.87 s for one epoch of 48 models) and lose a factor of eight on a busy one, where they wait for each other
    after every kernel. One thread also makes the weights independent of the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class ModelStreams:
    """The random streams of one model.

    Attributes:
        order: Of the order of samples, by epoch.
        dropout: Of the dropout masks.
    """

    order: Stream
    dropout: Stream


def epoch_orders(stream: Stream, n: int, epochs: range, device: torch.device) -> Tensor:
    """The order of samples in some epochs: row e sorts one 64-bit key per sample, whatever other epochs are asked for.

    Args:
        stream: The model's own stream.
        n: Samples.
        epochs: Which epochs.
        device: Where to compute.

    Returns:
        int64 ``(len(epochs), n)``, each row a permutation of 0 .. n - 1.
    """
    sample = torch.arange(n, device=device)
    epoch = torch.arange(epochs.start, epochs.stop, device=device)
    words = stream.words(sample[None], epoch[:, None])
    # Keys are compared as signed numbers, which is one more fixed bijection of random words.
    return torch.argsort(words[..., 0] << 32 | words[..., 1], dim=1, stable=True)


def train_stacked(
    forward: StackedForward,
    weights: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    subsets: Tensor,
    streams: Sequence[ModelStreams],
    recipe: Recipe,
    hidden_units: int,
) -> dict[str, Tensor]:
    """Trains g models together.

    Args:
        forward: ``forward(weights, inputs (g, batch, ...), keep (g, batch, hidden_units)) -> logits (g, batch,
            classes)``.
        weights: Initial weights stacked on dimension 0, ``(g, ...)`` each, on the device of the computation.
        x: Inputs of the whole training set ``(n_train, ...)``, on that device.
        y: Labels ``(n_train,)``, on that device.
        subsets: int64 ``(g, subset_size)``, the samples of each model.
        streams: The random streams of each model.
        recipe: How to train.
        hidden_units: Units per sample that dropout may drop.

    Returns:
        The trained weights, stacked in the same way.
    """
    device, (g, size) = x.device, subsets.shape
    subsets = subsets.to(device)
    trained = {name: value.clone().requires_grad_(True) for name, value in weights.items()}
    parameters = list(trained.values())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    block = (_CUDA_BLOCK if device.type == "cuda" else _CPU_BLOCK) // (g * size * hidden_units) + 1
    for first in range(0, recipe.epochs, block):
        epochs = range(first, min(first + block, recipe.epochs))
        orders = torch.stack([epoch_orders(stream.order, size, epochs, device) for stream in streams], dim=1)
        rows = subsets.expand(len(epochs), -1, -1).gather(2, orders)
        shape = (len(epochs), size, hidden_units)
        offset = first * size * hidden_units
        keep = (
            torch.stack(
                [s.dropout.keep_mask(shape, recipe.dropout, offset=offset, device=device) for s in streams], dim=1
            )
            if recipe.dropout
            else None
        )
        for epoch in range(len(epochs)):
            for start in range(0, size, recipe.batch_size):
                part = slice(start, start + recipe.batch_size)
                batch = rows[epoch, :, part]
                factors = None if keep is None else keep[epoch, :, part].to(x.dtype) / (1.0 - recipe.dropout)
                logits = forward(trained, x[batch], factors)
                # Summed over models and averaged over samples: each model gets the gradient of its own mean.
                loss = functional.cross_entropy(logits.flatten(0, 1), y[batch].flatten(), reduction="sum")
                gradients = torch.autograd.grad(loss / batch.shape[1], parameters)
                with torch.no_grad():
                    for parameter, speed, gradient in zip(parameters, velocity, gradients, strict=True):
                        speed.mul_(recipe.momentum).add_(gradient)
                        parameter.sub_(speed, alpha=recipe.lr)
    return {name: value.detach() for name, value in trained.items()}
