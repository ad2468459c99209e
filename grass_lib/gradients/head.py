"""Cross-entropy of a causal language model in portions of tokens: the logits of a batch are never held together."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.gradients.capture import LayerCapture, Tables
from grass_lib.gradients.compiling import compile_apart
from grass_lib.gradients.language import IGNORED, Reduction, following_labels
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.ranks import is_distributed

TOKENS = 1024
"""Tokens whose logits are held at once."""
# Settings of configurations that change logits after the output layer.
_CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


_values_only = False


@contextmanager
def values_only() -> Iterator[None]:
    """Losses that differentiate in their forward pass give their values alone, though a graph is kept."""
    global _values_only
    before, _values_only = _values_only, True
    try:
        yield
    finally:
        _values_only = before


@dataclass
class HeadTap:
    """Where an output that computes logits by itself hands over what the capture of the output layer needs.

    Attributes:
        capture: Of the output layer.
        probe: Gets the gradient: ``(batch, k1 * k2)``, or ``(batch, length, k1)`` where the contraction is deferred;
            None where only `shape` and `dtype` are asked for.
        deferred: Leaves the contraction to the caller.
        kept: Set by the output: the layer's input, compressed.
        shape: Set by the output: ``(batch, length)``.
        dtype: Set by the output: that of the logits.
    """

    capture: LayerCapture
    probe: Tensor | None = None
    deferred: bool = False
    kept: Tensor | None = None
    shape: tuple[int, ...] = field(default=())
    dtype: torch.dtype = torch.float32


def takes_head(output: Output) -> bool:
    """Whether an output computes logits by itself and takes a `HeadTap` as the keyword ``head``."""
    try:
        return "head" in inspect.signature(output).parameters
    except (TypeError, ValueError):
        return False


def chunked_causal_loss(
    model: Any, batch: Batch, reduction: Reduction = "sum", *, tokens: int = TOKENS, head: HeadTap | None = None
) -> Tensor:
    """`causal_loss` without the logits: the same values and gradients, in the memory of ``tokens`` rows of logits.

    Gradients with respect to the output layer's input, and the compressed ones of its weights, are computed in the
    forward pass, while a portion's logits are there. The output layer's weights themselves get no gradient.

    Args:
        model: Of transformers, with a linear output layer.
        batch: A dict with ``"labels"`` ``(batch, length)``, as in `causal_loss`.
        reduction: ``"sum"`` over a sequence's tokens, or their ``"mean"``.
        tokens: Tokens whose logits are held at once.
        head: Where the output layer's gradients go; given by `FactoredGradients` where that layer is captured.

    Returns:
        ``(batch,)`` in nats.

    Raises:
        UsageError: The model or the batch has another form, or ``tokens`` is below 1.
    """
    if tokens < 1:
        raise UsageError(f"tokens is {tokens}; expected 1 or more tokens whose logits are held at once")
    body, layer = _parts(model)
    following = following_labels(batch, reduction)
    result = body(**{name: value for name, value in batch.items() if name != "labels"})  # pyright: ignore[reportAttributeAccessIssue]
    hidden = getattr(result, "last_hidden_state", result)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != following.shape:
        seen = f"shape {tuple(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise UsageError(
            f"the model's body returned {seen} for labels of shape {tuple(following.shape)}; expected hidden states "
            "(batch, length, width)"
        )
    probe, kept, tables = None, None, (None, None)
    if head is not None:
        (kept,) = head.capture.keep(layer, hidden, None)
        head.kept, head.shape, head.dtype = kept, tuple(following.shape), hidden.dtype
        probe, tables = head.probe, head.capture.tables
    capture, deferred = (None, False) if head is None else (head.capture, head.deferred)
    total = _HeadLoss.apply(
        hidden, probe, layer.weight, layer.bias, following, kept, *tables, capture, deferred, tokens
    )
    return total if reduction == "sum" else total / (following != IGNORED).sum(dim=1).clamp_min(1)


def _parts(model: Any) -> tuple[Any, nn.Linear]:
    """The model without its output layer, and that layer."""
    body, getter = getattr(model, "base_model", None), getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    if body is None or body is model or not isinstance(layer, nn.Linear):
        raise UsageError(
            f"the {type(model).__name__} has no body and linear output layer that chunked_causal_loss could run one "
            "after the other; expected a causal language model of transformers, or use causal_loss"
        )
    if type(layer).forward is not nn.Linear.forward:
        raise UsageError(
            f"the output layer of the {type(model).__name__} is a {type(layer).__name__} with a forward of its own, "
            "which chunked_causal_loss leaves out; use causal_loss"
        )
    if is_distributed(layer.weight):
        raise UsageError(
            f"the output layer of the {type(model).__name__} is sharded over ranks, and chunked_causal_loss needs it "
            "whole; leave it out of fully_shard, or use causal_loss"
        )
    changed = [name for name in _CHANGED_LOGITS if getattr(getattr(model, "config", None), name, None) not in (None, 1)]
    if changed:
        raise UsageError(
            f"the {type(model).__name__} changes its logits after the output layer ({', '.join(changed)}), which "
            "chunked_causal_loss leaves out; use causal_loss"
        )
    return body, layer


class _HeadLoss(torch.autograd.Function):
    """Loss of each sequence from the output layer's input; portions of tokens go through it one after the other."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        probe: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        following: Tensor,
        kept: Tensor | None,
        index: Tensor | None,
        matrix: Tensor | None,
        capture: LayerCapture | None,
        deferred: bool,
        tokens: int,
    ) -> Tensor:
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and capture is not None
        needed = (False, False) if _values_only else needed
        losses, below, left = _portions(
            hidden.detach().flatten(0, 1),
            weight.detach(),
            None if bias is None else bias.detach(),
            following.flatten(),
            tokens,
            needed[0],
            capture if needed[1] else None,
            (index, matrix),
        )
        ctx.save_for_backward(
            None if below is None else below.view(hidden.shape),
            None if left is None else left.view(*following.shape, -1),
            kept if left is not None and not deferred else None,
        )
        ctx.capture, ctx.deferred = capture, deferred
        return losses.view(following.shape).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        below, left, kept = ctx.saved_tensors
        factor = gradients[0][:, None, None]
        below = None if below is None else below * factor.to(below.dtype)
        found = None if left is None else left * factor.to(left.dtype)
        if found is not None and not ctx.deferred:
            found = ctx.capture.join(found, kept)
        return (below, found, *(None,) * 9)


def _portions(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    following: Tensor,
    tokens: int,
    wants_below: bool,
    capture: LayerCapture | None,
    tables: Tables,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses ``(n,)`` of all tokens, gradients ``(n, width)`` below the layer, compressed ones ``(n, k1)`` above it."""
    # A value alone is asked for once or twice; compiling for that would take longer.
    compiles = hidden.is_cuda and (wants_below or capture is not None)
    losses: list[Tensor] = []
    below: list[Tensor] = []
    left: list[Tensor] = []
    for part, labels in zip(hidden.split(tokens), following.split(tokens), strict=True):
        # Whole portions have a code of their own: what else was seen before changes none of their bits.
        step = _compiled_step(len(part) != tokens) if compiles else _step
        found, delta = step(functional.linear(part, weight, bias), labels, wants_below or capture is not None)
        losses.append(found)
        if wants_below:
            below.append(delta @ weight)
        if capture is not None:
            left.append(capture.shorten(delta, tables))
    return torch.cat(losses), torch.cat(below) if below else None, torch.cat(left) if left else None


def _step(logits: Tensor, labels: Tensor, wants_delta: bool) -> tuple[Tensor, Tensor]:
    """Losses ``(n,)`` and, in the logits' dtype, their gradients ``(n, vocabulary)``; an empty tensor if not wanted."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counts = labels != IGNORED
    target = labels.clamp_min(0)[:, None]
    total = torch.logsumexp(wide, dim=1, keepdim=True)
    losses = (total - wide.gather(1, target)).squeeze(1) * counts
    if not wants_delta:
        return losses, logits.new_empty(0)
    delta = torch.exp(wide - total)
    if torch.compiler.is_compiling():
        # One loop over the logits for a compiler; a mask of their size would be another pass where there is none.
        columns = torch.arange(logits.shape[1], device=logits.device)
        delta = (delta - (columns == target).to(delta.dtype)) * counts[:, None]
    else:
        delta[torch.arange(len(delta), device=delta.device), target.squeeze(1)] -= 1.0
        delta *= counts[:, None]
    return losses, delta.to(logits.dtype)


@functools.cache
def _compiled_step(any_size: bool) -> Any:
    return compile_apart(_step, dynamic=any_size)
