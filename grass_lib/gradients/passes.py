"""One forward and backward pass through a model whose layers hand their compressed gradients to probes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from grass_lib.errors import UsageError
from grass_lib.gradients.blocks import CompiledBlocks, used_twice
from grass_lib.gradients.capture import LayerCapture
from grass_lib.gradients.column_chain import ColumnChain, Use, mark, reached
from grass_lib.gradients.compiling import compile_apart
from grass_lib.gradients.fp8 import fp8_products
from grass_lib.gradients.head import HeadTap, takes_head, values_only
from grass_lib.gradients.layer_check import LayerChecks
from grass_lib.gradients.layers import first_input
from grass_lib.gradients.meter import Meter
from grass_lib.gradients.outputs import Batch, Output, output_name
from grass_lib.gradients.state import evaluating
from grass_lib.kernels.columns import check_columns
from grass_lib.words import few

logger = logging.getLogger(__name__)

Compile: TypeAlias = bool | Literal["blocks"]
"""Whether passes are compiled: as a whole, or block by block with one compiled code for all of them."""
Sides = dict[str, Use]
"""By layer, in the order in which a pass calls them."""


@dataclass
class Captured:
    """What one pass gives.

    Attributes:
        gradients: Gradient of each probe, by layer; None for a layer that the pass did not use.
        values: The output ``(batch,)``.
        inputs: Compressed input sides of the layers whose contraction was deferred.
    """

    gradients: dict[str, Tensor | None]
    values: Tensor
    inputs: dict[str, Tensor] = field(default_factory=dict)


class CapturePass:
    """Runs a model with its layers' outputs handed through probes.

    Attributes:
        model: The model.
        captures: By layer.
    """

    def __init__(
        self,
        model: nn.Module,
        captures: Mapping[str, LayerCapture],
        *,
        compile: Compile,
        head: str | None = None,
        meter: Meter | None,
        dtype: torch.dtype,
        fp8: Sequence[str] = (),
    ) -> None:
        """Prepares a pass; the model is not touched.

        Args:
            model: The model.
            captures: By module name.
            compile: Compiles forward and backward pass, or the model's blocks.
            head: The output layer, where it is captured.
            meter: Measures stage 1; None for nothing.
            dtype: Of contracted gradients.
            fp8: Layers whose products run in FP8.
        """
        self.model, self.captures = model, captures
        self._modules = dict(model.named_modules())
        self._checks = LayerChecks({name: (self._modules[name], capture.shape) for name, capture in captures.items()})
        self._blocks = CompiledBlocks(model, captures) if compile == "blocks" else None
        self._compiled: Any = compile_apart(_evaluate) if compile is True else _evaluate
        self._head = head
        self._meter, self._dtype, self._fp8 = meter, dtype, fp8
        self._whole = compile is True
        self._probes: dict[str, Tensor] = {}
        self._inputs: dict[str, tuple[Tensor, ...]] = {}
        self._deferred: Sides = {}
        self._chain: ColumnChain | None = None
        self._zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._depth = 0

    @contextmanager
    def attached(self, *, short: bool = False) -> Iterator[None]:
        """Hooks the layers, freezes the weights and puts the model in evaluation mode; blocks may be nested.

        Args:
            short: For one pass, for which weights that FP8 products replace are not moved to the host.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        with ExitStack() as stack:
            flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            stack.callback(_restore, flags)
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            stack.enter_context(evaluating(self.model))
            if self._fp8:
                stack.enter_context(fp8_products(self.model, self._fp8, keep_weights=short))
            if self._blocks is not None:
                stack.enter_context(self._blocks.installed())
            for name, capture in self.captures.items():
                if self._blocks is not None and name in self._blocks.names:
                    continue
                module = self._modules[name]
                stack.callback(module.register_forward_pre_hook(self._before(capture), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after(capture)).remove)
            self._depth = 1
            stack.callback(setattr, self, "_depth", 0)
            yield

    def __call__(
        self, output: Output, samples: Batch, n: int, *, compiled: bool, deferred: Sides | None = None
    ) -> Captured:
        """One pass.

        Args:
            output: What is differentiated.
            samples: The batch.
            n: Its size.
            compiled: Uses the compiled pass, where there is one.
            deferred: Layers whose contraction is left to the caller; see `single_uses`.

        Raises:
            UsageError: If what the output returns or a layer's output has another form.
        """
        if torch.is_inference_mode_enabled():
            raise UsageError(
                "gradients are asked for inside torch.inference_mode(), where PyTorch keeps nothing to differentiate; "
                "expected a call outside of it (torch.no_grad() does no harm)"
            )
        self._checks(lambda batch: _evaluate(output, self.model, batch, None), samples, n)
        # Expanded from one number: a probe has a shape and a gradient, but no memory.
        zero = self._zero(self._dtype)
        self._deferred, self._inputs = deferred or {}, {}
        self._probes = {name: zero.expand(n, capture.size) for name, capture in self.captures.items()}
        for name, use in self._deferred.items():
            self._probes[name] = self._zero(use.output).expand(use.shape)
        if compiled and self._whole:
            inner = {name: use for name, use in self._deferred.items() if name != self._head}
            self._chain = ColumnChain(self.captures, inner)
        probes = [probe.requires_grad_() for probe in self._probes.values()]
        head = self._head_tap(output)
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                if self._blocks is not None:
                    stack.enter_context(self._blocks.probing(self._probes, self._deferred, compiled=compiled))
                values = (self._compiled if compiled else _evaluate)(output, self.model, samples, head)
                check_columns()
                inside = {} if self._blocks is None else self._blocks.kept()
                if not isinstance(values, Tensor) or values.shape != (n,):
                    seen = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                    raise UsageError(
                        f"loss returned {seen} for {n} samples; expected one value per sample, shape ({n},). Do not "
                        "average over the batch."
                    )
                if not values.requires_grad and self._calls_any(output, samples):
                    raise UsageError(
                        f"the loss has no gradient with respect to the layers {few(list(self.captures))}, although the "
                        "model calls them: it is detached or computed without gradients (torch.no_grad, .item(), NumPy)"
                    )
                unused: list[Tensor | None] = [None] * len(probes)
                found = torch.autograd.grad(values.sum(), probes, allow_unused=True) if values.requires_grad else unused
            if self._head is not None and head is None and found[list(self._probes).index(self._head)] is None:
                raise UsageError(
                    f"the output layer {self._head} is captured, and {output_name(output)} did not "
                    "run it as a module; a function around chunked_causal_loss must take head= and pass it on "
                    "(functools.partial does), or leave the layer out with include_head=False"
                )
            if head is not None and head.deferred and head.kept is not None:
                inside[head.capture.name] = head.kept
            inputs = inside | {name: self._inputs[name][0] for name in self._deferred if name in self._inputs}
            return Captured(dict(zip(self._probes, found, strict=True)), values.detach(), inputs)
        finally:
            self._probes, self._deferred, self._inputs, self._chain = {}, {}, {}, None

    def _head_tap(self, output: Output) -> HeadTap | None:
        """What an output that computes logits by itself gets, where the output layer is captured."""
        if self._head is None or not takes_head(output):
            return None
        return HeadTap(self.captures[self._head], self._probes.get(self._head), self._head in self._deferred)

    def _zero(self, dtype: torch.dtype) -> Tensor:
        """One number, made once: making dozens in every step would be dozens of launches."""
        device = next(self.model.parameters()).device
        key = device, dtype
        if key not in self._zeros:
            self._zeros[key] = torch.zeros(1, device=device, dtype=dtype)
        return self._zeros[key]

    def single_uses(self, output: Output, samples: Batch, n: int) -> Sides:
        """Layers whose contraction may wait until the pass is over, because it uses them exactly once.

        Args:
            output: Run once to see; nothing is differentiated.
            samples: The batch.
            n: Its size.
        """
        if self._whole:
            try:
                return self._seen(output, samples, n, linking=True)
            except Exception as error:  # noqa: BLE001 - whatever it is, it comes once more where it is the pass's own
                logger.debug("the layers behind the loss are not known, and no layer is linked: %s", error)
        return self._seen(output, samples, n, linking=False)

    def _seen(self, output: Output, samples: Batch, n: int, *, linking: bool) -> Sides:
        """`single_uses`, with or without looking for the layers behind the loss."""
        seen: dict[str, list[Use]] = {}
        nodes: dict[str, Any] = {}
        probe = self._zero(self._dtype).detach().requires_grad_()

        def note(name: str, x: Tensor, y: Tensor) -> Tensor | None:
            seen.setdefault(name, []).append(Use((*y.shape[:-1], self.captures[name].out.k), y.dtype, x.dtype))
            if not (linking and self.captures[name].keeps_columns):
                return None
            y = mark(y, probe)
            nodes[name] = y.grad_fn
            return y

        head = self._head_tap(output)
        values = self._watch(output, samples, head, note, graph=linking)
        if head is not None:
            use = Use((*head.shape, head.capture.out.k), head.dtype, head.dtype)
            seen.setdefault(head.capture.name, []).append(use)
        behind = reached(values, nodes)
        return {
            name: uses[0]._replace(reached=name in behind)
            for name, uses in seen.items()
            if len(uses) == 1 and uses[0].shape[0] == n and self.captures[name].can_defer
        }

    def _calls_any(self, output: Output, samples: Batch) -> bool:
        """Whether a pass calls one of the layers; run once more to see, where nothing has a gradient."""
        called: list[str] = []
        self._watch(output, samples, None, lambda name, x, y: called.append(name))
        return bool(called)

    def _watch(
        self,
        output: Output,
        samples: Batch,
        head: HeadTap | None,
        note: Callable[[str, Tensor, Tensor], Tensor | None],
        *,
        graph: bool = False,
    ) -> Any:
        """Runs the pass; ``note`` gets name, input and output of every called layer, and may replace the output.

        Args:
            output: What is evaluated.
            samples: The batch.
            head: Where the output layer's shape goes.
            note: Called for every layer.
            graph: Keeps the graph of automatic differentiation, without the tensors in it; what differentiates by
                itself in the pass fails.
        """

        def watching(name: str) -> Any:
            return lambda module, args, kwargs, y: note(name, first_input(args, kwargs), y)

        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(graph))
            if graph:
                stack.enter_context(values_only())
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _dropped))
            for name in self.captures:
                stack.callback(self._modules[name].register_forward_hook(watching(name), with_kwargs=True).remove)
            return _evaluate(output, self.model, samples, head)

    def _before(self, capture: LayerCapture) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if capture.name in self._probes:
                if not torch.compiler.is_compiling():
                    self._checks.see(capture.name, args, kwargs)
                    if capture.name in self._deferred and capture.name in self._inputs:
                        raise used_twice(capture.name)
                x = first_input(args, kwargs)
                chain = self._chain
                if chain is not None and chain.takes(capture.name):
                    self._inputs[capture.name] = (chain.keep(capture, x),)
                else:
                    self._inputs[capture.name] = capture.keep(module, x, self._clock())

        return hook

    def _after(self, capture: LayerCapture) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
            name = capture.name
            if name not in self._probes:
                return None
            if self._chain is not None and self._chain.took(name):
                return self._chain.tap(capture, y, self._probes[name])
            if name in self._deferred:
                return capture.tap(y, self._probes[name])
            return capture.apply(self._inputs.pop(name), y, self._probes[name], self._clock())

        return hook

    def _clock(self) -> Meter | None:
        return None if torch.compiler.is_compiling() else self._meter


def _dropped(kept: None) -> Tensor:
    raise RuntimeError("a tensor was asked for that nobody kept")


def _evaluate(output: Any, model: nn.Module, samples: Batch, head: HeadTap | None) -> Tensor:
    return output(model, samples) if head is None else output(model, samples, head=head)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
