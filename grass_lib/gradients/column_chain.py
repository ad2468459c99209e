"""Kept columns of a compiled pass, copied beside it.

Copying columns waits for memory, while the layer's products beside it wait for arithmetic: a recorded step does both
at once (`columns_beside`). A compiler gives the memory of a tensor to the next one as soon as nothing reads it any
more, and it does not see that a copy on another stream still does. So copies form a chain: each takes the tensor and
the result of the one before, and waits for it. In the forward pass the hooks hand both on. In the backward pass
automatic differentiation does: every layer's tap takes two outputs of the tap before it that have no memory, and what
it gives as their gradients are its own output's gradient and the kept columns. Only layers that the loss depends on
are linked: the gradient of another one would be computed for the link alone, as zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grass_lib.gradients.capture import LayerCapture, handed_on
from grass_lib.kernels.columns import columns_beside, own_value


class Use(NamedTuple):
    """How a pass uses a layer whose contraction is left to the caller.

    Attributes:
        shape: ``(batch, ..., k1)`` of its compressed output side.
        output: Type of its output.
        input: Type of its input.
        reached: Whether the loss is known to depend on its output.
    """

    shape: tuple[int, ...]
    output: torch.dtype
    input: torch.dtype
    reached: bool = False


class ColumnChain:
    """The chain of one pass; layers that come in another order than expected are not part of it."""

    def __init__(self, captures: Mapping[str, LayerCapture], uses: Mapping[str, Use]) -> None:
        """Lays out the chain.

        Args:
            captures: By layer.
            uses: Layers whose contraction is left to the caller, in the order in which the model calls them.
        """
        self._captures, self._uses = captures, uses
        self._names = [name for name, use in uses.items() if use.reached and captures[name].keeps_columns]
        self._place = 0
        self._taken: dict[str, bool] = {}
        self._before: tuple[Tensor, ...] = ()
        self._links: tuple[Tensor, ...] = ()

    def takes(self, name: str) -> bool:
        """Whether the layer is the next one."""
        return self._place < len(self._names) and self._names[self._place] == name

    def took(self, name: str) -> bool:
        """Whether `keep` has seen the layer."""
        return name in self._taken

    def keep(self, capture: LayerCapture, x: Tensor) -> Tensor:
        """Kept columns of the next layer's input.

        Args:
            capture: Of the layer.
            x: ``(batch, ..., d_in)``.

        Returns:
            ``(batch, ..., k2)``.
        """
        self._taken[capture.name] = True
        self._place += 1
        last, (index, ones) = self._place == len(self._names), capture.input_columns
        with torch.no_grad():
            # As a matrix, which the layer makes of it too: a compiler that sees one tensor writes it once.
            flat = own_value(x.detach().flatten(0, -2))
            kept = columns_beside(flat, index, ones, last=last or _runs_as_it_is(), held=self._before)  # pyright: ignore[reportArgumentType]
        # What is still here at the end of a compiled pass is one of its results, and lives as long as the chain.
        self._before = () if last else (flat, kept)
        return kept.unflatten(0, x.shape[:-1])

    def tap(self, capture: LayerCapture, y: Tensor, probe: Tensor) -> Tensor:
        """`LayerCapture.tap` as a link of the chain.

        Args:
            capture: Of the layer.
            y: Its output ``(batch, ..., d_out)``.
            probe: ``(batch, ..., k1)``; its gradient will be the compressed output side.
        """
        links = self._links or (None, None)
        y, *after = _LinkedTap.apply(y, probe, *links, capture.tables[0], self._following(capture.name))
        self._links = tuple(after)
        return y

    def _following(self, name: str) -> tuple[Any, ...] | None:
        """Shapes of the next layer's output and its kept columns as matrices, and their type; None for the last one."""
        place = self._names.index(name) + 1
        if place == len(self._names):
            return None
        use = self._uses[self._names[place]]
        n = math.prod(use.shape[:-1])
        return (n, self._captures[self._names[place]].shape.d_out), (n, use.shape[-1]), use.output


def mark(y: Tensor, probe: Tensor) -> Tensor:
    """A layer's output with a node of its own, to be found again by `reached`.

    Args:
        y: The output.
        probe: Any tensor that requires a gradient.
    """
    return _Mark.apply(y, probe)  # pyright: ignore[reportReturnType]


def reached(values: Any, nodes: Mapping[str, Any]) -> set[str]:
    """Names whose nodes lie behind some values in the graph of automatic differentiation.

    Where another pass detaches such a layer, its link carries zeros, which become NaN at an infinite derivative below.

    Args:
        values: What a loss returned.
        nodes: The ``grad_fn`` of what `mark` gave, by name.
    """
    found: set[Any] = set()
    left = [values.grad_fn] if isinstance(values, Tensor) and values.grad_fn is not None else []
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [one for one, _ in node.next_functions if one is not None]
    return {name for name, node in nodes.items() if node in found}


class _Mark(torch.autograd.Function):
    """Identity on a layer's output."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor) -> Tensor:
        return handed_on(ctx, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None


def _runs_as_it_is() -> bool:
    """Whether no compiler sees this code: then anything may be written over a tensor, and nobody would notice."""
    return not torch.compiler.is_compiling()


class _LinkedTap(torch.autograd.Function):
    """Identity on a layer's output whose backward pass gives the probe kept columns, and hands links on."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        probe: Tensor,
        held_delta: Tensor | None,
        held_columns: Tensor | None,
        index: Tensor,
        following: tuple[Any, ...] | None,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.last = held_delta is None
        y = handed_on(ctx, y)
        if following is None:
            return (y,)
        *shapes, dtype = following
        return y, *(y.new_zeros((), dtype=dtype).expand(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        delta, *held = gradients
        (index,) = ctx.saved_tensors
        flat = own_value(delta.flatten(0, -2))
        kept = columns_beside(flat, index, last=ctx.last or _runs_as_it_is(), held=held)
        links = (None, None) if ctx.last else (flat, kept)
        return delta, kept.unflatten(0, delta.shape[:-1]), *links, None, None
