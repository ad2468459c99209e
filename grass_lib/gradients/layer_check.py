"""Layers with a forward pass of their own: whether their weights' gradients are those of their kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from grass_lib.errors import UsageError
from grass_lib.gradients.blocks import first_input
from grass_lib.gradients.inputs import moments
from grass_lib.gradients.layers import LayerShape

_FORWARDS = {
    "linear": nn.Linear.forward,
    "conv2d": nn.Conv2d.forward,
    "embedding": nn.Embedding.forward,
    "layernorm": nn.LayerNorm.forward,
    "rmsnorm": nn.RMSNorm.forward,
}
_NEAR = {torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of the largest entry, by type of the weights; 1 % for wider ones."""


def has_own_forward(module: nn.Module, kind: str) -> bool:
    """Whether a layer runs other code than PyTorch's class of its kind, or transformers' ``Conv1D``.

    Args:
        module: The layer.
        kind: One of ``layers.KINDS``.
    """
    if "forward" in module.__dict__:
        return True
    forward = type(module).forward
    if kind == "conv1d":
        return forward.__module__ != "transformers.pytorch_utils"
    return forward is not _FORWARDS[kind]


@contextmanager
def layers_checked(layers: Mapping[str, tuple[nn.Module, LayerShape]]) -> Iterator[None]:
    """Compares layers with their kinds when they are called first within the block.

    A layer may scale what it looks up, or normalise another dimension: then its weight's gradient is not the sum over
    tokens that a capture takes. Both are differentiated by PyTorch here, against the same random numbers.

    Args:
        layers: Layers and their shapes, by name.

    Raises:
        UsageError: A layer's gradient is another one; raised by the pass that calls it.
    """
    left = dict(layers)

    def watching(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in left:
                problem = _difference(module, left.pop(name)[1], args, kwargs)
                if problem:
                    raise UsageError(
                        f"layer '{name}' ({type(module).__name__}) cannot be captured: {problem}; leave it out of "
                        "layers="
                    )

        return hook

    with ExitStack() as stack:
        for name, (module, _) in layers.items():
            stack.callback(module.register_forward_pre_hook(watching(name), with_kwargs=True).remove)
        yield


def _difference(module: Any, shape: LayerShape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How a layer differs from its kind, empty where it does not or nobody can say."""
    args, kwargs = tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, (args, kwargs))
    weights = [module.weight, *([module.bias] if shape.bias else [])]
    if not all(weight.is_leaf and weight.is_floating_point() for weight in weights):
        return ""
    flags = [weight.requires_grad for weight in weights]
    try:
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            y = module.forward(*args, **kwargs)
            if not isinstance(y, Tensor):
                return f"it returns a {type(y).__name__}, and a tensor was expected"
            generator = torch.Generator(y.device).manual_seed(0)
            given = torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)
            own = torch.autograd.grad(y, weights, given, allow_unused=True) if y.requires_grad else [None]
            try:
                plain = _of_kind(module, shape, first_input(args, kwargs))
                alike = plain.shape == y.shape
                usual = torch.autograd.grad(plain, weights, given) if alike else []
            except (RuntimeError, IndexError, TypeError):  # it is not even called as its kind is
                alike, usual = False, []
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if alike and all(one is not None and _near(one, other) for one, other in zip(own, usual, strict=False)):
        return ""
    return (
        f"its class has a forward of its own, with which the gradient of its weight is not that of a {shape.kind} layer"
    )


def _near(one: Tensor, other: Tensor) -> bool:
    one, other = (part.to_dense() if part.is_sparse else part for part in (one, other))
    error, largest = (one - other).abs().max(), other.abs().max()
    return bool(error <= _NEAR.get(one.dtype, 0.01) * largest)


def _of_kind(module: Any, shape: LayerShape, x: Tensor) -> Tensor:
    """What a layer of this kind computes."""
    weight, bias = module.weight, module.bias if shape.bias else None
    if shape.kind == "linear":
        return functional.linear(x, weight, bias)
    if shape.kind == "conv1d":
        return functional.linear(x, weight.mT, bias)
    if shape.kind == "conv2d":
        return nn.Conv2d._conv_forward(module, x, weight, bias)
    if shape.kind == "embedding":
        return functional.embedding(x, weight, module.padding_idx)
    if shape.kind == "layernorm":
        return functional.layer_norm(x, (shape.d_out,), weight, bias, module.eps)
    mean, rstd = moments(module, x, centred=False)
    return (((x - mean) * rstd) * weight).to(x.dtype)
