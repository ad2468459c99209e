"""The ResNet-9 of the CIFAR-2 pair: a stem, three residual blocks, the mean over pixels, one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.errors import DataError, UsageError
from grass_lib.rng import Stream


@dataclass(frozen=True)
class ResNet9Sizes:
    """Sizes of the model; those of the paper where nothing is said.

    Attributes:
        width: Channels of the stem; the blocks have 2, 4 and 8 times as many.
        stem_stride: 2 halves the image at once, and the work with it by four.
        classes: Of the output.

    Raises:
        UsageError: A size is below 1.
    """

    width: int = 64
    stem_stride: int = 1
    classes: int = 2

    def __post_init__(self) -> None:
        if min(self.width, self.stem_stride, self.classes) < 1:
            raise UsageError(f"{self}: expected whole numbers of 1 or more")

    @property
    def parameters(self) -> int:
        """Trainable weights: 4,825,154 at the paper's sizes."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in ResNet9(self).parameters())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one, each with batch normalisation; rectified before and after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Builds the block with PyTorch's own initial weights.

        Args:
            inputs: Channels that come in.
            outputs: Channels that go out.
            stride: Of the first convolution and of the one beside it.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, outputs, height / stride, width / stride)`` of ``(batch, inputs, height, width)``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        return functional.relu(y + self.shortcut_norm(self.shortcut(x)))


class ResNet9(nn.Module):
    """4,825,154 parameters at the paper's sizes (section 4.1)."""

    def __init__(self, sizes: ResNet9Sizes | None = None) -> None:
        """Builds the model with PyTorch's own initial weights.

        Args:
            sizes: None for the paper's.
        """
        super().__init__()
        sizes = sizes or ResNet9Sizes()
        width = sizes.width
        self.stem = nn.Conv2d(3, width, 3, stride=sizes.stem_stride, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.block1 = ResidualBlock(width, 2 * width, 1)
        self.block2 = ResidualBlock(2 * width, 4 * width, 2)
        self.block3 = ResidualBlock(4 * width, 8 * width, 2)
        self.head = nn.Linear(8 * width, sizes.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, 3, height, width)``."""
        x = functional.relu(self.stem_norm(self.stem(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean(dim=(2, 3)))


def initial_state(sizes: ResNet9Sizes, stream: Stream, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """An initial state dict from a stream, distributed as PyTorch draws it.

    Weights of convolutions, weights and biases of the linear layer: uniform within 1 / sqrt(fan_in). Batch
    normalisation starts as the identity.

    Args:
        sizes: Of the model.
        stream: The model's own stream.
        device: Where to compute; None is the CPU. The numbers are the same, bit by bit.

    Returns:
        A state dict of :class:`ResNet9` on that device.
    """
    state: dict[str, Tensor] = {}
    offset = 0
    with torch.device("meta"):
        modules = dict(ResNet9(sizes).named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features, device=device or "cpu")
            state.update({f"{name}.{key}": value.detach() for key, value in fresh.state_dict().items()})
        elif isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            for key, parameter in module.named_parameters():
                values = stream.uniform(tuple(parameter.shape), offset=offset, device=device)
                state[f"{name}.{key}"] = values.mul_(2.0).sub_(1.0).mul_(bound)
                offset += values.numel()
    return state


def load_state(model: ResNet9, state: Mapping[str, Tensor]) -> None:
    """Copies a state dict into a model in place, so that what was recorded for its memory stays valid.

    Args:
        model: On any device.
        state: From `initial_state` or `state_of`.

    Raises:
        DataError: Names or shapes are not those of the model.
    """
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        raise DataError(
            f"weights do not fit the model: {', '.join(wrong[:3])} missing, unknown or of another shape; expected the "
            f"{len(own)} tensors of a {type(model).__name__} of the same sizes"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def state_of(model: ResNet9) -> dict[str, Tensor]:
    """A copy of a model's state dict on the CPU, buffers included."""
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
