"""Music Transformer (Huang et al. 2019): attention that also weighs how far back an event lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.experiments.data.events import PAD, VOCABULARY
from grass_lib.rng import Stream


@dataclass(frozen=True)
class MusicSizes:
    """Sizes of a Music Transformer; the defaults are the paper's, 13,115,782 parameters.

    Attributes:
        layers: Number of layers.
        width: Of the hidden states.
        heads: Of the attention; they divide the width.
        feedforward: Width inside the feed-forward network of a layer.
        length: Events in a window at most.

    Raises:
        UsageError: A size is below 1, the heads do not divide the width, or the width is odd.
    """

    layers: int = 6
    width: int = 512
    heads: int = 8
    feedforward: int = 1024
    length: int = 256

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.feedforward, self.length) < 1:
            raise UsageError(f"{self}: expected sizes of 1 or more")
        if self.width % self.heads or self.width % 2:
            raise UsageError(f"{self}: expected an even width that the heads divide")


class MusicTransformer(nn.Module):
    """Predicts the event after a window of events.

    The norms follow the residual sums, positions are sinusoids added to the embedding, and every layer has a table of
    relative positions that its heads share.
    """

    positions: Tensor

    def __init__(self, sizes: MusicSizes, dropout: float = 0.1) -> None:
        """Builds the model; its weights come from `initial_weights` or a checkpoint.

        Args:
            sizes: Of the model.
            dropout: In training mode, of the embedding, the attention weights and the outputs inside the layers.
        """
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(VOCABULARY, sizes.width)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(_Layer(sizes, dropout) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, VOCABULARY)
        self.register_buffer("positions", sinusoids(sizes.length, sizes.width), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the event that follows each window.

        Args:
            ids: int64 ``(batch, length)``, length at most that of the sizes; PAD at the end does not count.

        Returns:
            ``(batch, VOCABULARY)``.
        """
        # Only the last event's state is asked for, and only the last layer can leave out the others.
        last = ((ids != PAD).sum(dim=1) - 1).clamp_min(0)
        x = self._embed(ids)
        for place, layer in enumerate(self.layers, start=1):
            x = layer(x, last if place == len(self.layers) else None)
        return self.head(self.norm(x).squeeze(1))

    def hidden(self, ids: Tensor) -> Tensor:
        """Hidden states ``(batch, length, width)`` after the last norm; each sees its own event and those before it."""
        x = self._embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embedding(ids) + self.positions[: ids.shape[1]])


class _Layer(nn.Module):
    def __init__(self, sizes: MusicSizes, dropout: float) -> None:
        super().__init__()
        self.attention = RelativeAttention(sizes, dropout)
        self.norm1 = nn.LayerNorm(sizes.width)
        self.linear1 = nn.Linear(sizes.width, sizes.feedforward)
        self.linear2 = nn.Linear(sizes.feedforward, sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        mixed = self.dropout(self.attention(x, last))
        x = self.norm1((x if last is None else _rows(x, last)) + mixed)
        inner = self.dropout(functional.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(inner)))


class RelativeAttention(nn.Module):
    """Causal attention of several heads with relative positions.

    Event i weighs event j <= i by ``q_i (k_j + e_(i - j)) / sqrt(d)``, with one row e of a table for each distance.
    """

    def __init__(self, sizes: MusicSizes, dropout: float) -> None:
        """Builds the layer.

        Args:
            sizes: Of the model.
            dropout: Of the attention weights in training mode.
        """
        super().__init__()
        self.heads, self.drop = sizes.heads, dropout
        self.query = nn.Linear(sizes.width, sizes.width)
        self.key_value = nn.Linear(sizes.width, 2 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        # The last row belongs to the distance 0, the one before it to 1, and so on.
        self.relative = nn.Parameter(torch.empty(sizes.length, sizes.width // sizes.heads))
        nn.init.xavier_uniform_(self.relative)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: ``(batch, length, width)``.
            last: int64 ``(batch,)``: only this event of each sample attends; None for all.

        Returns:
            ``(batch, length, width)``, or ``(batch, 1, width)`` with ``last``.
        """
        query = self._split(self.query(x if last is None else _rows(x, last)))
        key, value = (self._split(part) for part in self.key_value(x).chunk(2, dim=2))
        by_distance = query @ self.relative[-x.shape[1] :].mT * query.shape[3] ** -0.5
        bias = _by_place(by_distance) if last is None else _by_place_of(by_distance, last)
        if self.training:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=self.drop)
        else:
            # Per-sample gradients vectorise the backward pass, which fused attention does sample by sample.
            mixed = (query @ key.mT * query.shape[3] ** -0.5 + bias).softmax(dim=3) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """By heads: ``(batch, length, width)`` as ``(batch, heads, length, d)``."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _rows(x: Tensor, last: Tensor) -> Tensor:
    """One event of each sample: ``(batch, 1, width)`` of ``(batch, length, width)``."""
    # A sum of one number and zeros is exact, and unlike a gather its backward pass adds in one order on a GPU.
    chosen = torch.arange(x.shape[1], device=x.device) == last[:, None]
    return (x * chosen[:, :, None].to(x.dtype)).sum(dim=1, keepdim=True)


def _by_place(by_distance: Tensor) -> Tensor:
    """From distances to places: entry (i, j) belongs to the distance i - j, and is -inf where j is yet to come.

    Args:
        by_distance: ``(batch, heads, length, length)``, the distances length - 1 .. 0 in each row.
    """
    batch, heads, length, _ = by_distance.shape
    # Row i has to move left by length - 1 - i places: with one more column on the left, the same numbers read in rows
    # of one less are moved by just that.
    moved = functional.pad(by_distance, (1, 0)).reshape(batch, heads, length + 1, length)[:, :, 1:]
    future = torch.ones(length, length, dtype=torch.bool, device=moved.device).triu(1)
    return moved.masked_fill(future, -torch.inf)


def _by_place_of(by_distance: Tensor, last: Tensor) -> Tensor:
    """Row ``last`` of `_by_place` for each sample.

    Args:
        by_distance: ``(batch, heads, 1, length)``.
        last: int64 ``(batch,)``.
    """
    length = by_distance.shape[3]
    place = torch.arange(length, device=last.device)
    # Column j takes what stands length - 1 - last places further right; a product with ones and zeros is exact.
    moves = place[:, None] == place + (length - 1 - last)[:, None, None]
    moved = by_distance @ moves[:, None].to(by_distance.dtype)
    return moved.masked_fill((place > last[:, None])[:, None, None], -torch.inf)


def build_music_transformer(sizes: MusicSizes, dropout: float = 0.1) -> MusicTransformer:
    """A model in evaluation mode with weights that mean nothing; PyTorch's generators stay as they are.

    Args:
        sizes: Of the model.
        dropout: In training mode.
    """
    with torch.random.fork_rng(devices=[]):
        return MusicTransformer(sizes, dropout).eval()


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of positions, in turn, of wavelengths from 2 pi to 10,000 times that (Vaswani et al. 2017).

    Args:
        length: Positions.
        width: Even.

    Returns:
        float32 ``(length, width)``.
    """
    place = torch.arange(length, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    angles = place * rate
    return torch.stack([angles.sin(), angles.cos()], dim=2).reshape(length, width).to(torch.float32)


def initial_weights(sizes: MusicSizes, stream: Stream) -> dict[str, Tensor]:
    """Initial weights from a stream.

    Matrices and relative positions within ``sqrt(6 / (fan_in + fan_out))`` (Glorot and Bengio 2010), those of queries,
    keys and values as one matrix; the embedding standard normal, biases zero, norms one.

    Args:
        sizes: Of the model.
        stream: The model's own stream.

    Returns:
        A state dict of `MusicTransformer`, computed on the CPU so that every device starts from the same numbers.
    """
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in MusicTransformer(sizes).named_parameters()}
    weights: dict[str, Tensor] = {}
    offset = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        if name == "embedding.weight":
            weights[name] = stream.normal(tuple(shape), offset=offset)
        else:
            joined = ".query." in name or ".key_value." in name
            bound = math.sqrt(6.0 / (4 * sizes.width if joined else sum(shape)))
            weights[name] = stream.uniform(tuple(shape), offset=offset).mul_(2.0 * bound).sub_(bound)
        # Normals and uniforms have counters of their own; numbers in between are left out.
        offset += shape.numel()
    return weights


def parameter_count(sizes: MusicSizes) -> int:
    """Number of parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MusicTransformer(sizes).parameters())
