"""One forward and backward pass over a loader that shows every linear layer's output gradients and inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from grass_lib.errors import UsageError
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.layers import LayerShape, first_input, not_samples
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.gradients.state import evaluating
from grass_lib.gradients.stream import progress_bar, sample_count

KINDS = ("linear", "conv1d")
"""Kinds of layers whose input is a vector of features for every token."""
Visit: TypeAlias = Callable[[str, int, Tensor, Tensor], None]


class TokenPass:
    """Shows ``visit`` the two sides of every layer's per-sample gradient ``sum_t delta_t x_t^T``.

    Weights are frozen, so that nothing is computed for them, and a layer's tensors are let go as soon as they have been
    shown. The model runs in evaluation mode and is left as it was found, also after an exception.
    """

    def __init__(self, model: nn.Module, loss: Output, shapes: Mapping[str, LayerShape], visit: Visit) -> None:
        """Checks the layers; the model is not touched.

        Args:
            model: On the device where the passes run.
            loss: ``loss(model, batch) -> (batch,)``.
            shapes: Layers by module name.
            visit: ``visit(layer, first, delta, x)`` for each layer that a batch used: the number of the batch's first
                sample, ``(batch, tokens, d_out)`` and ``(batch, tokens, d_in)`` with the bias column, at least float32.
                A layer that is used twice has the tokens of both uses.

        Raises:
            UsageError: A layer is of another kind.
        """
        for name, shape in shapes.items():
            if shape.kind not in KINDS:
                raise UsageError(
                    f"layer '{name}' is of the kind {shape.kind}; masks by side are made for {' and '.join(KINDS)} "
                    "layers, leave it out of layers="
                )
        self._model, self._loss, self._shapes, self._visit = model, loss, dict(shapes), visit
        self._modules = dict(model.named_modules())
        self._device = next(model.parameters()).device
        self._active: _Batch | None = None

    def walk(self, loader: Iterable[Batch], *, description: str = "layers", progress: bool = True) -> int:
        """Goes through a loader once.

        Args:
            loader: Yields batches with samples on dimension 0.
            description: For the bar.
            progress: Shows a bar when it lasts more than 3 s.

        Returns:
            The number of samples.

        Raises:
            UsageError: The loss does not give one value per sample, or a layer's output has another form.
        """
        seen = 0
        bar = progress_bar(sample_count(loader), description, progress)
        with bar, self._attached():
            for batch in loader:
                samples = batch_to(batch, self._device)
                size = batch_size(samples)
                self._one(samples, seen, size)
                seen += size
                bar.update(size)
        return seen

    def _one(self, samples: Batch, first: int, size: int) -> None:
        # A root for the graph although all weights are frozen: every layer's output has it added, and it is zero.
        root = torch.zeros((), device=self._device, requires_grad=True)
        self._active = active = _Batch(root, first, size)
        try:
            with torch.enable_grad():
                values = self._loss(self._model, samples)
                if not isinstance(values, Tensor) or values.shape != (size,):
                    seen = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                    raise UsageError(
                        f"loss returned {seen} for {size} samples; expected one value per sample, shape ({size},). Do "
                        "not average over the batch."
                    )
                if values.requires_grad:
                    torch.autograd.grad(values.sum(), root, allow_unused=True)
            for name in list(active.found):
                self._show(name, active)
        finally:
            self._active = None

    def _forward(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            active = self._active
            if active is None:
                return None
            x = first_input(args, kwargs).detach()
            if y.shape[0] != active.size:
                raise not_samples(name, y.shape, active.size)
            # The model may go on to change the input in place.
            version = x._version
            active.uses[name] = active.uses.get(name, 0) + 1
            y = y + active.root.to(y.dtype)

            def backward(delta: Tensor) -> None:
                if x._version != version:
                    raise UsageError(
                        f"the input of layer '{name}' is changed in place later in the pass; leave it out of layers="
                    )
                active.found.setdefault(name, []).append((delta, x))
                if len(active.found[name]) == active.uses[name]:
                    self._show(name, active)

            y.register_hook(backward)
            return y

        return hook

    def _show(self, name: str, active: _Batch) -> None:
        parts, bias = active.found.pop(name), self._shapes[name].bias
        with torch.no_grad():
            delta = torch.cat([_tokens(delta) for delta, _ in parts], dim=1)
            x = torch.cat([_tokens(x) for _, x in parts], dim=1)
            if bias:
                x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
            self._visit(name, active.first, delta, x)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
            for parameter, flag in flags:
                stack.callback(parameter.requires_grad_, flag)
                parameter.requires_grad_(False)
            stack.enter_context(evaluating(self._model))
            for name in self._shapes:
                hook = self._modules[name].register_forward_hook(self._forward(name), with_kwargs=True)
                stack.callback(hook.remove)
            yield


class _Batch:
    """What is known of the batch in hand: its root, numbers, and layers' uses so far."""

    def __init__(self, root: Tensor, first: int, size: int) -> None:
        self.root, self.first, self.size = root, first, size
        self.uses: dict[str, int] = {}
        self.found: dict[str, list[tuple[Tensor, Tensor]]] = {}


def _tokens(x: Tensor) -> Tensor:
    """``(batch, tokens, d)`` in at least float32."""
    x = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
