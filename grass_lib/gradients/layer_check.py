"""What is looked at once, before layers are captured: samples on dimension 0, and gradients that are of their kind."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from grass_lib.errors import UsageError
from grass_lib.gradients.capture import NORMS
from grass_lib.gradients.full import batch_slice
from grass_lib.gradients.inputs import moments
from grass_lib.gradients.layers import LayerShape, first_input, not_samples, refused
from grass_lib.gradients.outputs import Batch

logger = logging.getLogger(__name__)

_FORWARDS = {
    "linear": nn.Linear.forward,
    "conv2d": nn.Conv2d.forward,
    "embedding": nn.Embedding.forward,
    "layernorm": nn.LayerNorm.forward,
    "rmsnorm": nn.RMSNorm.forward,
}
_NEAR = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 0.01, torch.float64: 0.01}
"""Of the largest entry, by type of the weights; those of other types are packed, and are not compared."""
_PORTION = 2**22  # numbers that are compared at a time


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


class LayerChecks:
    """Looks at captured layers by a pass over one sample.

    A layer may have something else than samples on dimension 0, such as tokens or a table that is looked up once for
    all samples: where a batch has as many samples, only another batch shows it. And a layer whose class has a forward
    of its own may scale what it looks up, or normalise another dimension: then its weight's gradient is not the sum
    over tokens that a capture takes. Both are differentiated by PyTorch here, against the same random numbers.
    """

    def __init__(self, layers: Mapping[str, tuple[nn.Module, LayerShape]]) -> None:
        """Remembers the layers.

        Args:
            layers: Layers and their shapes, by name.
        """
        self._layers = layers
        self._own = {name for name, (module, shape) in layers.items() if has_own_forward(module, shape.kind)}
        self._looked = self._sized = False

    def __call__(self, evaluate: Callable[[Batch], Any], samples: Batch, n: int) -> None:
        """Looks at what has not been looked at.

        Args:
            evaluate: Runs the pass.
            samples: A batch.
            n: Its size; of one sample alone nobody can tell what dimension 0 has.

        Raises:
            UsageError: A layer cannot be captured.
        """
        if self._sized or (n < 2 and (self._looked or not self._own)):
            return
        try:
            self._look(evaluate, batch_slice(samples, 0, 1), sized=True)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it comes once more where it is the pass's own
            logger.debug("one sample alone cannot be evaluated: %s", error)
            self._look(evaluate, samples, sized=False)
        self._looked, self._sized = True, n > 1

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares a layer with its kind where that has not been done, before it is called in any pass.

        Args:
            name: Of the layer.
            args: Of the call.
            kwargs: Of the call.

        Raises:
            UsageError: Its weight's gradient is another one.
        """
        if name in self._own:
            module, shape = self._layers[name]
            problem = _difference(module, shape, args, kwargs)
            if problem:
                raise refused(name, module, problem)
            self._own.remove(name)

    def _look(self, evaluate: Callable[[Batch], Any], samples: Batch, *, sized: bool) -> None:
        def before(name: str) -> Any:
            return lambda module, args, kwargs: self.see(name, args, kwargs)

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
                if sized and isinstance(y, Tensor) and y.shape[:1] != (1,):
                    raise not_samples(name, y.shape, 1)

            return hook

        with torch.no_grad(), ExitStack() as stack:
            for name, (module, _) in self._layers.items():
                if name in self._own:
                    stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
            evaluate(samples)


def _difference(module: Any, shape: LayerShape, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How a layer differs from its kind, empty where it does not or nobody can say.

    Nobody can where the weights are packed, somewhere else until the layer runs, or out of its gradient's reach.
    """
    args, kwargs = tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, (args, kwargs))
    weights = [module.weight, *([module.bias] if shape.bias else [])]
    count = shape.d_out if shape.kind in NORMS else shape.d_out * (shape.d_in - shape.bias)
    plain = all(weight.is_leaf and weight.dtype in _NEAR and not weight.is_meta for weight in weights)
    if not plain or weights[0].numel() != count or torch.is_inference_mode_enabled():
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
            given = torch.randn(y.shape, generator=generator, device=y.device)
            given = (given / max(1, y.numel() // shape.d_out) ** 0.5).to(y.dtype)
            # A copy for each: a backward pass may work in place.
            own = torch.autograd.grad(y, weights, given.clone(), allow_unused=True) if y.requires_grad else [None]
            if module.weight is not weights[0]:
                return ""
            try:
                usual_y = _of_kind(module, shape, first_input(args, kwargs))
                alike = usual_y.shape == y.shape
                usual = torch.autograd.grad(usual_y, weights, given.clone()) if alike else []
            except (RuntimeError, IndexError, TypeError):  # it is not even called as its kind is
                alike, usual = False, []
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    if alike and all(one is None or _near(one, other) for one, other in zip(own, usual, strict=False)):
        return ""
    return (
        f"its class has a forward of its own, with which the gradient of its weight is not that of a {shape.kind} layer"
    )


def _near(one: Tensor, other: Tensor) -> bool:
    within = _NEAR[one.dtype]
    one, other = (part.to_dense() if part.is_sparse else part for part in (one, other))
    rows, errors, sizes = max(1, _PORTION // max(1, one[0].numel())), list[Tensor](), list[Tensor]()
    for mine, usual in zip(one.split(rows), other.split(rows), strict=True):
        mine, usual = mine.double(), usual.double()
        finite = mine.isfinite() & usual.isfinite()  # samples may be damaged, which is not the layer's fault
        errors.append((mine - usual).where(finite, 0.0).abs().max())
        sizes.append(usual.where(finite, 0.0).abs().max())
    return bool(torch.stack(errors).max() <= within * torch.stack(sizes).max())


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
