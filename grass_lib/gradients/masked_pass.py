"""One forward and backward pass in which layers hand kept coordinates of their gradients to probes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from grass_lib.gradients.capture import handed_on
from grass_lib.gradients.layers import first_input
from grass_lib.gradients.masked_layers import MaskedLayer
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.gradients.state import ModelState, copy_onto


@dataclass
class Found:
    """What a pass gives.

    Attributes:
        gradients: Kept coordinates ``(n, m)`` by layer; None for a layer that the pass did not use.
        values: The output ``(n,)``; None where it has another form.
        problems: Why layers cannot be taken this way, by layer.
        mixed: Whether samples of the batch influence each other.
        checked: Whether enough samples had a gradient to tell that they do not.
    """

    gradients: dict[str, Tensor | None]
    values: Tensor | None
    problems: dict[str, str] = field(default_factory=dict)
    mixed: bool = False
    checked: bool = False


class MaskedPass:
    """Runs a model as it is, for a whole batch, with its layers' outputs handed through probes.

    No weight requires gradients: nothing is computed for a weight but what the layers compute for their probes.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, MaskedLayer]) -> None:
        """Takes the model and its layers by module name; the model is not touched."""
        self._model, self._layers = model, layers
        modules = dict(model.named_modules())
        self._modules = {name: modules[name] for name in layers}

    def __call__(self, state: ModelState, output: Output, samples: Batch, n: int, *, check: bool) -> Found:
        """One pass; the model is in evaluation mode.

        Args:
            state: The weights.
            output: What is differentiated.
            samples: The batch, on the device of the weights.
            n: Its size.
            check: Looks, by some more backward passes, for weights that are used beside their layer and for samples
                that influence each other.
        """
        run = _Run(n, state, self._model, self._modules, self._layers, check)
        with torch.enable_grad():
            with ExitStack() as stack:
                run.hook(stack)
                values = output(run.call, run.watch(samples) if check else samples)
            if run.problems or not isinstance(values, Tensor) or values.shape != (n,):
                return Found({}, None, run.problems)
            if check and values.requires_grad:
                run.examine(values)
                if run.problems or run.mixed:
                    return Found({}, None, run.problems, run.mixed)
            probes = list(run.probes.values())
            unused: list[Tensor | None] = [None] * len(probes)
            found = torch.autograd.grad(values.sum(), probes, allow_unused=True) if values.requires_grad else unused
        return Found(dict(zip(run.probes, found, strict=True)), values.detach(), checked=run.checked)


class _Run:
    """The moving parts of one pass."""

    def __init__(
        self,
        n: int,
        state: ModelState,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        layers: Mapping[str, MaskedLayer],
        check: bool,
    ) -> None:
        self.n, self.modules, self.layers, self.check = n, modules, layers, check
        self.problems: dict[str, str] = {}
        self.mixed = self.checked = False
        self.inputs: list[Tensor] = []
        weights = {**state.trainable, **state.fixed}
        # Expanded from one number: a probe has a shape and a gradient, but no memory.
        wide = torch.float64 if any(value.dtype == torch.float64 for value in weights.values()) else torch.float32
        zero = torch.zeros(1, device=next(iter(weights.values())).device, dtype=wide)
        self.probes = {name: zero.expand(n, layer.size).requires_grad_() for name, layer in layers.items()}
        # Cloned, so that a forward pass that counts in a buffer changes a copy.
        buffers = {name: torch.empty_like(value) for name, value in state.buffers.items()}
        copy_onto(list(buffers.values()), list(state.buffers.values()))
        self.owners = {part.name: name for name, layer in layers.items() for part in layer.parts.values()}
        if check:
            weights.update({name: weights[name].detach().requires_grad_() for name in self.owners})
        self.weights = weights

        def call(*args: Any, **kwargs: Any) -> Tensor:
            return functional_call(model, (weights, buffers), args, kwargs)

        self.call = call

    def hook(self, stack: ExitStack) -> None:
        """Hooks the layers until the stack is left."""
        for name, layer in self.layers.items():
            module = self.modules[name]
            if self.check:
                stack.callback(module.register_forward_pre_hook(self._hide(layer)).remove)
            hook = module.register_forward_hook(self._after(layer), with_kwargs=True, prepend=True)
            stack.callback(hook.remove)

    def watch(self, samples: Batch) -> Batch:
        """The batch, with floating inputs that gradients can be asked for."""

        def watched(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            self.inputs.append(value.detach().requires_grad_())
            return self.inputs[-1].clone()

        if isinstance(samples, Mapping):
            return {name: watched(value) for name, value in samples.items()}
        return tuple(watched(value) for value in samples)

    def examine(self, values: Tensor) -> None:
        """Differentiates groups of samples: nothing of other samples, and no weight itself, may answer."""
        spread = [*self.probes.values(), *self.inputs]
        weights = [self.weights[name] for name in self.owners]
        # Unequal, so that what samples of a group get from others does not cancel.
        scale = torch.linspace(1, 2, self.n, device=values.device)
        alive = torch.zeros(self.n, dtype=torch.bool, device=values.device)
        for group in groups_apart(self.n).to(values.device):
            ones = (group * scale).to(values.dtype)
            found = torch.autograd.grad(values, [*spread, *weights], ones, allow_unused=True, retain_graph=True)
            answers = torch.zeros_like(alive)
            for gradient in found[: len(spread)]:
                if gradient is not None:
                    # Where activations are not finite, zero times infinity is no sign of anything.
                    answers |= ((gradient != 0) & gradient.isfinite()).reshape(self.n, -1).any(dim=1)
            for (weight, owner), gradient in zip(self.owners.items(), found[len(spread) :], strict=True):
                if gradient is not None:
                    self.problems[owner] = f"'{weight}' is also used outside of its layer's call"
            self.mixed = bool((answers & ~group).any())
            if self.mixed or self.problems:
                return
            alive |= answers & group
        # One sample alone may be the one that others depend on, and that depends on none itself.
        self.checked = int(alive.sum()) >= min(self.n, 2)

    def _hide(self, layer: MaskedLayer) -> Any:
        """Inside its own layer a weight is a constant, so that only other uses of it show up as a gradient."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for attribute in layer.parts:
                value = module._parameters[attribute]
                if value is not None:
                    module._parameters[attribute] = value.detach()  # pyright: ignore[reportArgumentType]

        return hook

    def _after(self, layer: MaskedLayer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            if self.check:
                for attribute, part in layer.parts.items():
                    module._parameters[attribute] = self.weights[part.name]  # pyright: ignore[reportArgumentType]
            x = first_input(args, kwargs)
            if not isinstance(y, Tensor) or not layer.fits(x, y, self.n):
                seen = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                self.problems[layer.name] = f"its output {seen} has not the {self.n} samples on dimension 0"
                return None
            if len(y) != self.n:
                y = y.expand(self.n, *y.shape[1:])  # positions are looked up once for all samples
            return _Hand.apply(y, self.probes[layer.name], layer, *layer.keep(module, x))

        return hook


class _Hand(torch.autograd.Function):
    """Identity on a layer's output whose backward pass gives the probe the layer's kept coordinates."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, layer: MaskedLayer, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        ctx.layer = layer
        return handed_on(ctx, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return gradients[0], ctx.layer.rows(gradients[0], kept), None, *(None for _ in kept)


def groups_apart(n: int) -> Tensor:
    """The fewest groups of which, for every two samples, one holds the first sample without the second.

    Every sample is in another half of the groups, and no half is part of another one: eight groups serve 70 samples.

    Args:
        n: Number of samples, at least 1.

    Returns:
        Which samples are in a group, bool ``(groups, n)``; no group is empty.
    """
    count = next(count for count in itertools.count(2) if math.comb(count, count // 2) >= n)
    halves = torch.tensor(list(itertools.islice(itertools.combinations(range(count), count // 2), n)))
    groups = torch.zeros(count, n, dtype=torch.bool)
    groups[halves.T, torch.arange(n)] = True
    return groups[groups.any(dim=1)]


class RowWriter:
    """Puts the kept coordinates of layers where they belong in rows of all kept coordinates."""

    def __init__(self, layers: Mapping[str, MaskedLayer], k: int) -> None:
        """Looks at where the layers' coordinates lie.

        Args:
            layers: By module name.
            k: Length of a row.
        """
        self._layers = layers
        follows, end = [], 0
        for layer in layers.values():
            for part in layer.parts.values():
                follows.append(part.first == end)
                end += len(part.local)
        # Where every column belongs to one layer, and layers follow each other, rows are joined by one launch.
        self._joins = all(follows) and end == k

    def __call__(self, gradients: Mapping[str, Tensor | None], rows: Tensor) -> None:
        """Writes; columns of no layer become zeros.

        Args:
            gradients: By layer, as `Found` has them.
            rows: Is written to, ``(n, k)``.
        """
        if self._joins:
            found = (gradients[name] for name in self._layers)
            sizes = (layer.size for layer in self._layers.values())
            parts = [rows.new_zeros(len(rows), m) if one is None else one for one, m in zip(found, sizes, strict=True)]
            torch.cat(parts, dim=1, out=rows)
            return
        rows.zero_()
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            begin = 0
            for part in self._layers[name].parts.values():
                rows[:, part.columns] += gradient[:, begin : begin + len(part.local)]
                begin += len(part.local)
