"""Tiny models and data for tests: each model has one property that gradient code gets wrong easily."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, HIDDEN = 6, 3, 5


class MLP(nn.Module):
    """Two layers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(x))))


class Frozen(MLP):
    """The first layer's weight does not require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden.weight.requires_grad_(False)


class Unused(MLP):
    """Has a layer that the forward pass never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Tied(nn.Module):
    """Embedding and output share one matrix; input is class numbers ``(batch, length)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x).mean(dim=1))))


class Twice(MLP):
    """Uses one layer two times in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(torch.tanh(self.hidden(x))))
        return self.head(torch.tanh(self.shared(x)))


class Named(MLP):
    """Takes its inputs by name, as a dict batch gives them."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(torch.cat([left, right], dim=1))


class Normed(nn.Module):
    """Batch normalisation and dropout: in training mode batch mates would matter."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.norm(self.hidden(x)))))


class Block(nn.Module):
    """A feed-forward block of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Text(nn.Module):
    """Token and position embeddings, blocks, a norm and a head; token 0 is padding."""

    VOCABULARY, LENGTH = 11, 12

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(self.VOCABULARY, HIDDEN, padding_idx=0)
        self.position = nn.Embedding(self.LENGTH, HIDDEN)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, self.VOCABULARY)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)[None])
        # Tokens see the mean of what came before them.
        x = x.cumsum(dim=1) / torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(self.norm(x)))


class Image(nn.Module):
    """Convolutions with stride, dilation and padding; input ``(batch, 2, 9, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0))
        self.second = nn.Conv2d(4, 5, 3, padding="same", dilation=(2, 1), bias=False)
        self.third = nn.Conv2d(5, 4, 2, padding=1, padding_mode="circular")
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.third(x)).mean(dim=(2, 3)))


class Transposed(nn.Module):
    """The transposed linear layer of transformers' GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.hidden = Conv1D(HIDDEN, FEATURES)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "frozen": Frozen,
    "unused": Unused,
    "tied": Tied,
    "twice": Twice,
    "named": Named,
    "normed": Normed,
}
# Models with layers that only the factored path knows by kind.
LAYERED: dict[str, type[nn.Module]] = {"text": Text, "image": Image, "conv1d": Transposed}


def make_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with fixed weights (and, where it has them, buffers that are not at their defaults), in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (MODELS | LAYERED)[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None:
                module.running_mean.normal_()
    return model.to(dtype).train()


def make_samples(name: str, n: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Inputs and labels for a model: tensors with samples on dimension 0, labels last."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    if name == "tied":
        return torch.randint(0, CLASSES, (n, 4), generator=generator), labels
    if name == "text":
        return (torch.randint(1, Text.VOCABULARY, (n, 7), generator=generator),)
    if name == "image":
        return torch.randn(n, 2, 9, 8, generator=generator).to(dtype), labels
    x = torch.randn(n, FEATURES, generator=generator).to(dtype)
    if name == "named":
        return x[:, :2], x[:, 2:], labels
    return x, labels


def make_batch(name: str, samples: tuple[Tensor, ...]) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """The samples in the form that the model's batches have."""
    if name == "named":
        return dict(zip(("left", "right", "labels"), samples, strict=True))
    return samples


def make_loader(samples: tuple[Tensor, ...], batch_size: int = 4, name: str = "mlp") -> DataLoader:
    """A loader in fixed order over samples."""

    def collate(rows: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...] | dict[str, Tensor]:
        return make_batch(name, tuple(torch.stack(column) for column in zip(*rows, strict=True)))

    return DataLoader(TensorDataset(*samples), batch_size=batch_size, collate_fn=collate)


def loop_gradients(
    model: nn.Module, value_of: Callable[[nn.Module, int], Tensor], n: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Per-sample gradients by one plain backward pass per sample, ``(n, p)``: the reference for everything vectorised.

    The model is used as it is: give a float64 copy in evaluation mode.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = []
    for index in range(n):
        found = torch.autograd.grad(value_of(model, index), parameters, allow_unused=True)
        parts = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).to(dtype)
