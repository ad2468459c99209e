"""One layer's compressed per-sample gradient as the gradient of a probe.

A layer's output passes through an autograd function that hands it on unchanged and takes a *probe* ``(batch, k1 * k2)``
as a second input. In the backward pass the probe's gradient is ``sum_t (P1 delta_t) (P2 x_t)^T``, flattened output
side first: the layer's weight gradient, compressed on both sides, without ever being formed. So the capture is
ordinary automatic differentiation: a layer that is used twice adds its parts, and compilers trace through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.errors import UsageError
from grass_lib.gradients import inputs
from grass_lib.gradients.layers import LayerShape
from grass_lib.gradients.meter import Meter, measured
from grass_lib.gradients.sides import Side

NORMS = ("layernorm", "rmsnorm")


class LayerCapture:
    """The capture of one layer.

    Attributes:
        name: Module name.
        shape: Of the layer's gradient.
        out: Map of the output side.
        into: Map of the input side, bias column included.
        size: Length of the flattened contraction, k1 * k2.
    """

    def __init__(self, name: str, shape: LayerShape, out: Side, into: Side, dtype: torch.dtype) -> None:
        """Lays out the tables.

        Args:
            name: Module name.
            shape: Of the layer's gradient.
            out: Map of the output side.
            into: Map of the input side.
            dtype: Of the layer's weights, in which dense maps are applied.
        """
        self.name, self.shape, self.out, self.into = name, shape, out, into
        self.size = out.k * into.k
        self._out_index = out.index
        self._out_matrix = None if out.matrix is None else out.matrix.to(dtype)
        self._into = inputs.InputSide(into, shape, dtype)

    def apply(self, module: nn.Module, x: Tensor, y: Tensor, probe: Tensor, meter: Meter | None) -> Tensor:
        """Hands ``y`` on, with the probe attached.

        Args:
            module: The layer.
            x: Its input.
            y: Its output.
            probe: ``(batch, size)``.
            meter: Measures the time of the compression; None while a compiler traces.

        Raises:
            UsageError: The output's first dimension is not that of the samples.
        """
        batch = probe.shape[0]
        if y.shape[0] != batch:
            if y.shape[0] != 1 or self.shape.kind != "embedding":
                raise UsageError(
                    f"layer '{self.name}' gives an output of shape {tuple(y.shape)} in a batch of {batch} samples; "
                    "expected samples on dimension 0. Leave it out of layers="
                )
            # Position embeddings are looked up once for all samples.
            x, y = x.expand(batch, *x.shape[1:]), y.expand(batch, *y.shape[1:])
        with torch.no_grad(), measured(meter):
            if self.shape.kind in NORMS:
                kept = (x.detach(), *inputs.moments(module, x, centred=self.shape.kind == "layernorm"))
            else:
                kept = (self._into(module, x.detach()),)
        return _Capture.apply(y, probe, self._out_index, self._out_matrix, self, meter, *kept)

    def contract(self, delta: Tensor, kept: tuple[Tensor, ...], index: Tensor | None, matrix: Tensor | None) -> Tensor:
        """The gradient of the probe: ``(batch, size)``.

        Args:
            delta: Gradient of the loss with respect to the layer's output.
            kept: What the forward pass kept of the input.
            index: Kept coordinates of the output side.
            matrix: Dense map of the output side.
        """
        if self.shape.kind in NORMS:
            return self._contract_norm(delta, kept, index, matrix)
        if self.shape.kind == "conv2d":
            rows = delta.flatten(2)
            rows = rows if index is None else rows.index_select(1, index)
            left = _wide(rows if matrix is None else matrix.to(rows.dtype).mT @ rows)
            right = _wide(kept[0]).mT
        else:
            rows = delta.flatten(1, -2) if delta.dim() > 2 else delta.unsqueeze(1)
            rows = rows if index is None else rows.index_select(2, index)
            left = _wide(rows if matrix is None else rows @ matrix.to(rows.dtype)).mT
            if self._into.counts_tokens:
                return self._contract_tokens(left, kept[0].flatten(1))
            right = _wide(kept[0].flatten(1, -2) if kept[0].dim() > 2 else kept[0].unsqueeze(1))
        found = left @ right
        if self._into.scale != 1.0:
            found = found * self._into.scale
        if self._into.appends_bias:
            # The bias column of the input side is all ones: nothing of it is ever stored.
            found = torch.cat([found, left.sum(dim=2, keepdim=True) * self._into.scale], dim=2)
        return self._flat(found)

    def _contract_tokens(self, left: Tensor, ids: Tensor) -> Tensor:
        """Of an embedding whose vocabulary stays whole: ``left (batch, k1, tokens)`` summed by token."""
        batch, vocabulary = len(left), self.into.k
        place = ids + torch.arange(batch, device=ids.device)[:, None] * vocabulary
        columns = left.mT.flatten(0, 1)
        columns = columns if self._into.padding is None else columns * (ids.flatten() != self._into.padding)[:, None]
        found = left.new_zeros(batch * vocabulary, left.shape[1]).index_add_(0, place.flatten(), columns)
        return self._flat(found.unflatten(0, (batch, vocabulary)).mT)

    def _contract_norm(
        self, delta: Tensor, kept: tuple[Tensor, ...], index: Tensor | None, matrix: Tensor | None
    ) -> Tensor:
        x, mean, rstd = kept
        if index is not None:
            delta, x = delta.index_select(-1, index), x.index_select(-1, index)
        delta, tokens = _wide(delta), tuple(range(1, x.dim() - 1))
        weight = delta * ((_wide(x) - mean) * rstd)
        parts = [weight] if not self.shape.bias else [weight, delta]
        columns = torch.stack([part.sum(dim=tokens) if tokens else part for part in parts], dim=2)
        if matrix is not None:
            columns = (columns.mT @ matrix.to(columns.dtype)).mT
        return self._flat(columns)

    def _flat(self, found: Tensor) -> Tensor:
        return (found if self.out.scale == 1.0 else found * self.out.scale).flatten(1)


class _Capture(torch.autograd.Function):
    """Identity on a layer's output whose backward pass gives the probe its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        probe: Tensor,
        index: Tensor | None,
        matrix: Tensor | None,
        layer: LayerCapture,
        meter: Meter | None,
        *kept: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(index, matrix, *kept)
        ctx.layer, ctx.meter = layer, meter
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, matrix, *kept = ctx.saved_tensors
        with measured(ctx.meter):
            found = ctx.layer.contract(gradients[0], tuple(kept), index, matrix)
        return (gradients[0], found, None, None, None, None, *(None for _ in kept))


def _wide(x: Tensor) -> Tensor:
    """Half types as float32, in which contractions are computed and summed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
