"""Kept coordinates of linear layers and convolutions, from their inputs and the gradients of their outputs.

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

    @abstractmethod
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
        """The kept coordinates, see `MaskedLayer.rows`."""
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
        """Whether input and output have samples on dimension 0."""
        return x.dim() == self._dims + 2 and super().fits(x, y, n)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The kept coordinates, see `MaskedLayer.rows`."""
        positions, x, delta = delta.shape[2:], kept[0], delta.flatten(2)
        if self._kernel:
            # Some samples at a time, so that padded inputs are read while they are in the cache and take little memory.
            step = max(1, scratch_elements(x.device) // max(1, x[0].numel())) if any(self._pads) else len(x)
            found = [
                sampled_product(
                    delta[lo : lo + step],
                    self._padded(x[lo : lo + step]),
                    self._table,
                    tuple(positions),
                    self._stride,
                    self._dilation,
                )
                for lo in range(0, len(x), step)
            ]
            return found[0] if len(found) == 1 else torch.cat(found)
        parts = []
        if self._order is not None:
            # Some samples at a time: a shifted view has to be copied before rows of it can be gathered.
            step = max(1, scratch_elements(x.device) // (x.shape[1] * delta.shape[2]))
            found = []
            for lo in range(0, len(x), step):
                some, padded = delta[lo : lo + step], self._padded(x[lo : lo + step])
                found.append(torch.cat([self._block(some, padded, positions, *block) for block in self._blocks], dim=1))
            parts.append(torch.cat(found).index_select(1, self._order))
        if len(self._bias):
            parts.append(wide(delta.index_select(1, self._bias_rows)).sum(dim=2))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _padded(self, x: Tensor) -> Tensor:
        return functional.pad(x, self._pads, mode=self._mode) if any(self._pads) else x

    def _block(self, delta: Tensor, x: Tensor, positions: torch.Size, offset: tuple[int, ...], pairs: Pairs) -> Tensor:
        for dim, (at, length) in enumerate(zip(offset, positions, strict=True)):
            step, start = self._stride[dim], at * self._dilation[dim]
            x = x[(slice(None),) * (dim + 2) + (slice(start, start + (length - 1) * step + 1, step),)]
        x = x if pairs.all_columns else x.index_select(1, pairs.columns)
        return pairs.sums(delta, x.flatten(2))
