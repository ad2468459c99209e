"""Kept coordinates of layers' per-sample gradients, from a layer's input and the gradient of its output.

Each class knows one kind of layer. ``keep`` says in the forward pass what of the layer is needed later, ``rows`` gives
``(batch, m)`` in the backward pass: the kept coordinates of the weight, then those of the bias.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.gradients.capture import as_tokens
from grass_lib.gradients.coordinates import KeptPart
from grass_lib.gradients.pairs import Pairs, scratch_elements, wide
from grass_lib.kernels.sampled import SampledTable, sampled_product


class MaskedLayer(ABC):
    """One layer with kept coordinates.

    Attributes:
        name: Module name.
        parts: Kept coordinates by attribute, "weight" or "bias".
        size: Their number, m.
    """

    def __init__(self, name: str, module: Any, parts: Mapping[str, KeptPart], device: torch.device) -> None:
        """Lays out the tables.

        Args:
            name: Module name.
            module: The layer.
            parts: Kept coordinates of its weight and bias; at least one.
            device: Of the computation.
        """
        self.name, self.parts = name, parts
        self.size = sum(len(part.local) for part in parts.values())
        self.device = device
        self._weight = parts["weight"].local if "weight" in parts else torch.empty(0, dtype=torch.int64)
        self._bias = parts["bias"].local if "bias" in parts else torch.empty(0, dtype=torch.int64)
        self._bias_rows = self._bias.to(device)
        self._prepare(module)

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        """Whether input and output have samples on dimension 0."""
        return y.shape[0] == x.shape[0] == n

    def keep(self, module: Any, x: Tensor) -> tuple[Tensor, ...]:
        """What the backward pass needs: references, no copies."""
        return (x.detach(),)

    @abstractmethod
    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The kept coordinates ``(n, m)``, at least float32.

        Args:
            delta: Gradient of the layer's output.
            kept: From `keep`.
        """

    def _prepare(self, module: Any) -> None:
        """Tables of the kind."""


class MaskedLinear(MaskedLayer):
    """A linear layer, also the transposed one of GPT-2 in transformers; inputs ``(n, ..., d_in)``."""

    def __init__(
        self, name: str, module: Any, parts: Mapping[str, KeptPart], device: torch.device, *, kernel: bool = False
    ) -> None:
        self._kernel, self._transposed = kernel, not isinstance(module, nn.Linear)
        super().__init__(name, module, parts, device)

    def _prepare(self, module: Any) -> None:
        wide_side = module.weight.shape[1]
        first, second = self._weight // wide_side, self._weight % wide_side
        d_out, d_in = reversed(module.weight.shape) if self._transposed else module.weight.shape
        # Entries ascend by the rows of the stored matrix, whichever side that is.
        sides = (d_in, d_out) if self._transposed else (d_out, d_in)
        self._pairs = Pairs(first, second, *sides, self.device) if len(first) else None
        if self._kernel:
            outs, ins = (second, first) if self._transposed else (first, second)
            self._table = SampledTable(outs, ins[:, None], self._bias, self.device)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        delta, x = as_tokens(delta), as_tokens(kept[0])
        if self._kernel:
            return sampled_product(delta.mT, x.mT, self._table, (delta.shape[1],), (1,), (1,))
        parts = []
        if self._pairs is not None:
            left, right = (x, delta) if self._transposed else (delta, x)
            right = right if self._pairs.all_columns else right.index_select(2, self._pairs.columns)
            parts.append(self._pairs.sums(left.mT, right.mT))
        if len(self._bias):
            parts.append(wide(delta.index_select(2, self._bias_rows)).sum(dim=1))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class MaskedConvolution(MaskedLayer):
    """A convolution over one to three dimensions; inputs ``(n, channels, *positions)``.

    For a fixed place in the kernel, inputs meet outputs in one shifted view of the padded input: every place is a
    product over positions of its own, between output channels and input channels.
    """

    def __init__(
        self, name: str, module: Any, parts: Mapping[str, KeptPart], device: torch.device, *, kernel: bool = False
    ) -> None:
        self._kernel = kernel
        super().__init__(name, module, parts, device)

    def _prepare(self, module: Any) -> None:
        self._dims = len(module.kernel_size)
        self._stride, self._dilation = module.stride, module.dilation
        self._pads = list(module._reversed_padding_repeated_twice)
        self._mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        within, area = module.in_channels // module.groups, math.prod(module.kernel_size)
        outs, rest = self._weight // (within * area), self._weight % (within * area)
        channels = outs // (module.out_channels // module.groups) * within + rest // area
        places = rest % area
        if self._kernel:
            offsets, left = [], places
            for length in reversed(module.kernel_size):
                offsets.insert(0, left % length)
                left = left // length
            self._table = SampledTable(outs, torch.stack([channels, *offsets], dim=1), self._bias, self.device)
            return
        self._blocks: list[tuple[tuple[int, ...], Pairs]] = []
        order = []
        for number, offset in enumerate(itertools.product(*map(range, module.kernel_size))):
            here = (places == number).nonzero().flatten()
            if len(here):
                pairs = Pairs(outs[here], channels[here], module.out_channels, module.in_channels, self.device)
                self._blocks.append((offset, pairs))
                order.append(here)
        self._order = torch.cat(order).argsort().to(self.device) if order else None

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        return x.dim() == self._dims + 2 and super().fits(x, y, n)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        positions, x = delta.shape[2:], kept[0]
        if any(self._pads):
            x = functional.pad(x, self._pads, mode=self._mode)
        if self._kernel:
            return sampled_product(delta.flatten(2), x, self._table, tuple(positions), self._stride, self._dilation)
        delta = delta.flatten(2)
        parts = []
        if self._order is not None:
            # Some samples at a time: a shifted view has to be copied before rows of it can be gathered.
            step = max(1, scratch_elements(x.device) // (x.shape[1] * delta.shape[2]))
            found = [
                torch.cat([self._block(delta[lo : lo + step], x[lo : lo + step], positions, *b) for b in self._blocks], 1)
                for lo in range(0, len(x), step)
            ]
            parts.append(torch.cat(found).index_select(1, self._order))
        if len(self._bias):
            parts.append(wide(delta.index_select(1, self._bias_rows)).sum(dim=2))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _block(self, delta: Tensor, x: Tensor, positions: torch.Size, offset: tuple[int, ...], pairs: Pairs) -> Tensor:
        for dim, (at, length) in enumerate(zip(offset, positions, strict=True)):
            step, start = self._stride[dim], at * self._dilation[dim]
            x = x[(slice(None),) * (dim + 2) + (slice(start, start + (length - 1) * step + 1, step),)]
        x = x if pairs.all_columns else x.index_select(1, pairs.columns)
        return pairs.sums(delta, x.flatten(2))


class MaskedEmbedding(MaskedLayer):
    """A lookup table; inputs are token numbers ``(n, ...)``, or one row of positions for all samples."""

    def _prepare(self, module: Any) -> None:
        self._vocabulary, width = module.weight.shape
        tokens = self._weight // width
        counts = torch.bincount(tokens, minlength=self._vocabulary)
        if module.padding_idx is not None:
            counts[module.padding_idx] = 0
        # Where the coordinates of a token begin (those of padding are there and never reached), and how many it has.
        self._starts = torch.searchsorted(tokens, torch.arange(self._vocabulary)).to(self.device)
        self._counts = counts.to(self.device)
        self._features = (self._weight % width).to(self.device)

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        return x.dim() > 1 and len(x) == len(y) and len(x) in (1, n)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        n, delta = len(delta), as_tokens(delta)
        ids = kept[0].expand(n, *kept[0].shape[1:]).reshape(-1)
        times = self._counts[ids]
        # One entry for every token of the batch and every kept coordinate of it.
        token = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), times)
        within = torch.arange(len(token), device=ids.device) - (times.cumsum(0) - times)[token]
        column = self._starts[ids[token]] + within
        values = wide(delta.reshape(-1, delta.shape[-1])[token, self._features[column]])
        out = torch.zeros(n * self.size, device=delta.device, dtype=values.dtype)
        place = token // delta.shape[1] * self.size + column
        if out.is_cuda:
            # Sorts before it adds: no float atomics, unlike index_add_.
            out.index_put_((place,), values, accumulate=True)
        else:
            out.index_add_(0, place, values)
        return out.view(n, self.size)


class MaskedBatchNorm(MaskedLayer):
    """Batch normalisation in evaluation mode, by running moments; inputs ``(n, channels, ...)``."""

    def _prepare(self, module: Any) -> None:
        self._eps, self._weight_rows = module.eps, self._weight.to(self.device)

    def keep(self, module: Any, x: Tensor) -> tuple[Tensor, ...]:
        return x.detach(), module.running_mean.detach(), module.running_var.detach()

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        x, mean, variance = kept
        centre, spread = mean[self._weight_rows], variance[self._weight_rows]
        normal = wide(_channels(x, self._weight_rows)) - wide(centre)[:, None]
        weight = _channels(delta, self._weight_rows) * normal * torch.rsqrt(wide(spread) + self._eps)[:, None]
        return torch.cat([weight.sum(dim=2), wide(_channels(delta, self._bias_rows)).sum(dim=2)], dim=1)


class MaskedGroupNorm(MaskedLayer):
    """Normalisation of groups of channels; inputs ``(n, channels, ...)``."""

    def _prepare(self, module: Any) -> None:
        self._groups, self._eps, self._weight_rows = module.num_groups, module.eps, self._weight.to(self.device)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        normal = functional.group_norm(wide(kept[0]), self._groups, eps=self._eps)
        weight = _channels(delta, self._weight_rows) * _channels(normal, self._weight_rows)
        return torch.cat([weight.sum(dim=2), wide(_channels(delta, self._bias_rows)).sum(dim=2)], dim=1)


class MaskedLayerNorm(MaskedLayer):
    """Normalisation over the last dimensions, with or without centring; inputs ``(n, ..., *shape)``."""

    def _prepare(self, module: Any) -> None:
        self._dims, self._weight_rows = module.weight.dim(), self._weight.to(self.device)
        self._centred = isinstance(module, nn.LayerNorm)
        names = ("eps", "variance_epsilon")
        self._eps = next((value for name in names if (value := getattr(module, name, None)) is not None), None)

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        return x.dim() > self._dims and super().fits(x, y, n)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        x, shape = wide(kept[0]), kept[0].shape[-self._dims :]
        if self._centred:
            x = functional.layer_norm(x, shape, eps=self._eps)
        else:
            x = functional.rms_norm(x, shape, eps=torch.finfo(kept[0].dtype).eps if self._eps is None else self._eps)
        delta = as_tokens(delta.flatten(-self._dims))
        weight = delta.index_select(2, self._weight_rows) * as_tokens(x.flatten(-self._dims))[..., self._weight_rows]
        return torch.cat([weight.sum(dim=1), wide(delta.index_select(2, self._bias_rows)).sum(dim=1)], dim=1)


def _channels(x: Tensor, rows: Tensor) -> Tensor:
    """Chosen channels with all positions as one dimension, ``(n, m, positions)``."""
    return x.index_select(1, rows).reshape(len(x), len(rows), -1) if len(rows) else x.new_empty(len(x), 0, 1)


def masked_layer(
    name: str, module: nn.Module, parts: Mapping[str, KeptPart], device: torch.device, *, kernel: bool
) -> MaskedLayer | None:
    """The class for a layer, or None where its gradient has to be formed whole.

    A class that computes something of its own in ``forward`` is not taken for the one that it derives from.

    Args:
        name: Module name.
        module: The layer.
        parts: Kept coordinates of its weight and bias.
        device: Of the computation.
        kernel: Uses the GPU kernel for linear layers and convolutions.
    """
    if not set(parts) <= {"weight", "bias"}:
        return None
    forward = type(module).forward
    dims = {nn.Conv1d.forward: nn.Conv1d, nn.Conv2d.forward: nn.Conv2d, nn.Conv3d.forward: nn.Conv3d}
    # Classes of transformers are known by name, so that the package is not needed here.
    theirs = type(module).__name__ if type(module).__module__.startswith("transformers.") else ""
    if forward is nn.Linear.forward or theirs == "Conv1D":
        return MaskedLinear(name, module, parts, device, kernel=kernel)
    if forward in dims and type(module)._conv_forward is dims[forward]._conv_forward:  # pyright: ignore[reportAttributeAccessIssue]
        return MaskedConvolution(name, module, parts, device, kernel=kernel)
    if forward is nn.Embedding.forward and not (module.max_norm or module.scale_grad_by_freq):
        return MaskedEmbedding(name, module, parts, device)
    if forward is nn.BatchNorm2d.forward and isinstance(module.running_mean, Tensor):
        return MaskedBatchNorm(name, module, parts, device)
    if forward is nn.GroupNorm.forward:
        return MaskedGroupNorm(name, module, parts, device)
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or (theirs.endswith("RMSNorm") and "bias" not in parts):
        return MaskedLayerNorm(name, module, parts, device)
    return None
