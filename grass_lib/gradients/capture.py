"""One layer's compressed per-sample gradient as the gradient of a probe.

A layer's output passes through an autograd function that hands it on unchanged and takes a *probe* ``(batch, k1 * k2)``
as a second input. In the backward pass the probe's gradient is ``sum_t (P1 delta_t) (P2 x_t)^T``, flattened output
side first: the layer's weight gradient, compressed on both sides, without ever being formed. So the capture is
ordinary automatic differentiation: a layer that is used twice adds its parts, and compilers trace through it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from grass_lib.gradients import inputs
from grass_lib.gradients.layers import LayerShape, not_samples
from grass_lib.gradients.meter import Meter, measured
from grass_lib.gradients.sides import Side
from grass_lib.kernels.columns import kept_columns

NORMS = ("layernorm", "rmsnorm")
Tables: TypeAlias = tuple[Tensor | None, Tensor | None]
"""The map of an output side: kept coordinates, dense matrix; None for what it is not."""


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
        self.name, self.shape = name, shape
        self.size = out.k * into.k
        self._tables: Tables = (out.index, out.applied(dtype))
        self._into = inputs.InputSide(into, shape, dtype)
        self.out, self.into = out.at_rest(dtype), into.at_rest(dtype)

    @property
    def scale(self) -> float:
        """Factor that the contraction leaves out; whoever uses its result applies it, after stage 2."""
        return self.out.scale * self.into.scale

    @property
    def tables(self) -> Tables:
        """Of the output side, as `shorten` takes them."""
        return self._tables

    @property
    def appends_bias(self) -> bool:
        """Whether the contraction adds the column of the bias."""
        return self._into.appends_bias

    @property
    def can_defer(self) -> bool:
        """Whether the contraction may wait until the backward pass is over: both its sides are short."""
        return self.shape.kind in ("linear", "conv1d") and not (self.out.is_identity or self.into.is_identity)

    @property
    def keeps_columns(self) -> bool:
        """Whether the contraction may wait, and both sides are kept columns."""
        return self.can_defer and self.out.index is not None and self.into.index is not None

    @property
    def input_columns(self) -> tuple[Tensor | None, bool]:
        """Of a layer that `keeps_columns`: those of its input, and whether a column of ones for the bias follows."""
        return self._into.kept

    def keep(self, module: nn.Module, x: Tensor, meter: Meter | None) -> tuple[Tensor, ...]:
        """What is needed of the input: its compressed side; for a norm the input itself, which it has anyway.

        Done before the layer runs, while its input is still in the device's cache.

        Args:
            module: The layer.
            x: Its input.
            meter: Measures the time; None while a compiler traces.
        """
        with torch.no_grad(), measured(meter):
            if self.shape.kind in NORMS:
                return x.detach(), *inputs.moments(module, x, centred=self.shape.kind == "layernorm")
            return (self._into(module, x),)

    def apply(self, kept: tuple[Tensor, ...], y: Tensor, probe: Tensor, meter: Meter | None) -> Tensor:
        """Hands ``y`` on, with the probe attached.

        Args:
            kept: From `keep`.
            y: The layer's output.
            probe: ``(batch, size)``.
            meter: Measures the time of the compression; None while a compiler traces.

        Raises:
            UsageError: The output's first dimension is not that of the samples.
        """
        batch = probe.shape[0]
        if y.shape[0] != batch:
            if y.shape[0] != 1 or self.shape.kind != "embedding":
                raise not_samples(self.name, y.shape, batch)
            # Position embeddings are looked up once for all samples.
            kept = tuple(part.expand(batch, *part.shape[1:]) for part in kept)
            y = y.expand(batch, *y.shape[1:])
        return _Capture.apply(y, probe, *self._tables, self, meter, *kept)

    def tap(self, y: Tensor, probe: Tensor) -> Tensor:
        """Like `apply`, with the contraction left to `join`.

        Args:
            y: The layer's output ``(batch, ..., d_out)``.
            probe: ``(batch, ..., k1)``; its gradient will be the compressed output side.
        """
        return _Tap.apply(y, probe, *self._tables, self)

    def shorten(self, delta: Tensor, tables: Tables) -> Tensor:
        """The output side of a linear layer's gradient, compressed: ``(batch, ..., k1)``."""
        index, matrix = tables
        delta = delta if index is None else kept_columns(delta, index)
        return delta if matrix is None else delta @ matrix.to(delta.dtype)

    def join(self, left: Tensor, right: Tensor) -> Tensor:
        """Contracts both compressed sides over tokens.

        Args:
            left: Output side ``(batch, ..., k1)``.
            right: Input side ``(batch, ..., k2)``.

        Returns:
            ``(batch, size)``, at least float32.
        """
        left, right = as_tokens(left).mT, as_tokens(right)
        found = _product(left, right)
        if self.appends_bias:
            # The bias column of the input side is all ones: nothing of it is ever stored.
            found = torch.cat([found, _wide(left).sum(dim=2, keepdim=True)], dim=2)
        return found.flatten(1)

    def contract(self, delta: Tensor, kept: tuple[Tensor, ...], tables: Tables) -> Tensor:
        """The gradient of the probe: ``(batch, size)``.

        Args:
            delta: Gradient of the loss with respect to the layer's output.
            kept: What the forward pass kept of the input.
            tables: Of the output side.
        """
        if self.shape.kind in NORMS:
            return self._contract_norm(delta, kept, tables)
        if self.shape.kind == "conv2d":
            delta, kept = delta.flatten(2).mT, (kept[0].mT,)
        left = self.shorten(delta, tables)
        if self._into.counts_tokens:
            return self._contract_tokens(_wide(as_tokens(left)).mT, kept[0].reshape(len(left), -1))
        return self.join(left, kept[0])

    def _contract_tokens(self, left: Tensor, ids: Tensor) -> Tensor:
        """Of an embedding whose vocabulary stays whole: ``left (batch, k1, tokens)`` summed by token."""
        batch, vocabulary = len(left), self.into.k
        place = ids + torch.arange(batch, device=ids.device)[:, None] * vocabulary
        columns = left.mT.flatten(0, 1)
        columns = columns if self._into.padding is None else columns * (ids.flatten() != self._into.padding)[:, None]
        found = left.new_zeros(batch * vocabulary, left.shape[1]).index_add_(0, place.flatten(), columns)
        return found.unflatten(0, (batch, vocabulary)).mT.flatten(1)

    def _contract_norm(self, delta: Tensor, kept: tuple[Tensor, ...], tables: Tables) -> Tensor:
        index, matrix = tables
        x, mean, rstd = kept
        if index is not None:
            delta, x = delta.index_select(-1, index), x.index_select(-1, index)
        delta, tokens = _wide(delta), tuple(range(1, x.dim() - 1))
        weight = delta * ((_wide(x) - mean) * rstd)
        parts = [weight] if not self.shape.bias else [weight, delta]
        columns = torch.stack([part.sum(dim=tokens) if tokens else part for part in parts], dim=2)
        if matrix is not None:
            columns = (columns.mT @ matrix.to(columns.dtype)).mT
        return columns.flatten(1)


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
        return handed_on(ctx, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        index, matrix, *kept = ctx.saved_tensors
        with measured(ctx.meter):
            found = ctx.layer.contract(gradients[0], tuple(kept), (index, matrix))
        return (gradients[0], found, None, None, None, None, *(None for _ in kept))


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward pass gives the probe the output side, compressed."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        probe: Tensor,
        index: Tensor | None,
        matrix: Tensor | None,
        layer: LayerCapture,
    ) -> Tensor:
        ctx.save_for_backward(index, matrix)
        ctx.layer = layer
        return handed_on(ctx, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], ctx.layer.shorten(gradients[0], ctx.saved_tensors), None, None, None


def handed_on(ctx: Any, y: Tensor) -> Tensor:
    """A layer's output as the output of a function, without a copy.

    An activation after the layer may work in place: the output is the same tensor, or shares its memory without being
    a view in the eyes of automatic differentiation.
    """
    if torch.compiler.is_compiling() or y._is_view() or (y.is_leaf and y.requires_grad):
        return y.detach()
    ctx.mark_dirty(y)
    return y


def as_tokens(x: Tensor) -> Tensor:
    """All dimensions between the first and the last as one; a single token where there is none."""
    return x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)


def _wide(x: Tensor) -> Tensor:
    """Half types as float32, in which contractions are computed and summed."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product with at least float32 sums and results."""
    if left.is_cuda and left.dtype == right.dtype == torch.bfloat16:
        # The products are exact in float32: tensor cores lose nothing. (Sums of float16 may be rounded on the way.)
        return torch.bmm(left, right, out_dtype=torch.float32)
    return _wide(left) @ _wide(right)
