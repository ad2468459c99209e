"""The MLP of the MNIST pair: 784-128-64-10 with ReLU and dropout, alone and as a stack of many models.

The stacked form computes g models at once with batched matrix products: at this size one model leaves any machine idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.rng import Stream

SIZES = (784, 128, 64, 10)
PARAMETERS = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(SIZES))
"""Weights and biases."""
HIDDEN = sum(SIZES[1:-1])
"""Hidden units of one sample, each of which dropout may drop."""


class MLP(nn.Module):
    """784-128-64-10, ReLU, dropout after each hidden layer; 109,386 parameters (section 4.1 of the paper)."""

    def __init__(self, dropout: float = 0.1) -> None:
        """Builds the model with PyTorch's own initial weights.

        Args:
            dropout: Probability that a hidden unit is dropped in training mode.
        """
        super().__init__()
        self.fc1 = nn.Linear(SIZES[0], SIZES[1])
        self.fc2 = nn.Linear(SIZES[1], SIZES[2])
        self.fc3 = nn.Linear(SIZES[2], SIZES[3])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, 784)``."""
        x = self.dropout(functional.relu(self.fc1(x)))
        x = self.dropout(functional.relu(self.fc2(x)))
        return self.fc3(x)


def initial_weights(stream: Stream) -> dict[str, Tensor]:
    """Initial weights from a stream: uniform within 1 / sqrt(fan_in), as ``nn.Linear`` draws them.

    Args:
        stream: The model's own stream.

    Returns:
        A state dict of :class:`MLP`, computed on the CPU so that every device starts from the same numbers.
    """
    weights: dict[str, Tensor] = {}
    offset = 0
    for layer, (fan_in, fan_out) in enumerate(pairwise(SIZES), start=1):
        for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            values = stream.uniform(shape, offset=offset)
            weights[f"fc{layer}.{name}"] = values.mul_(2.0).sub_(1.0).mul_(fan_in**-0.5)
            offset += values.numel()
    return weights


def stacked_logits(weights: Mapping[str, Tensor], x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logits of g models at once.

    Args:
        weights: State dicts stacked on dimension 0, ``(g, ...)`` each.
        x: Images ``(g, batch, 784)``; ``(batch, 784)`` gives the same to every model.
        keep: Dropout factors ``(g, batch, 192)`` of the hidden units, 0 or 1 / (1 - p); None for evaluation.

    Returns:
        ``(g, batch, 10)``.
    """
    x = x.expand(len(weights["fc1.bias"]), -1, -1)
    first = 0
    for layer, size in enumerate(SIZES[1:], start=1):
        x = torch.baddbmm(weights[f"fc{layer}.bias"][:, None], x, weights[f"fc{layer}.weight"].mT)
        if layer < len(SIZES) - 1:
            x = functional.relu(x)
            if keep is not None:
                x = x * keep[..., first : first + size]
            first += size
    return x
