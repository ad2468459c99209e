"""One step of SGD with momentum on labelled images, on a GPU recorded as a CUDA graph: one launch for all kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

_WARM_UP = 3


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A recorded step and the memory that it reads its batch from."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor


class SGDStep:
    """Steps on the mean cross-entropy of a batch; weights and the buffers of normalisation change in place.

    On a GPU `record` records forward pass, backward pass and update together for each size of batch that will come,
    and every later step replays one of them. A batch of another size, and every batch on a CPU, runs kernel by kernel.
    """

    def __init__(self, model: nn.Module, *, momentum: float) -> None:
        """Prepares a step; nothing runs.

        Args:
            model: In training mode; stays where it is.
            momentum: Of SGD, in [0, 1).
        """
        self._model = model
        self._device = next(model.parameters()).device
        self._momentum = momentum
        self._rate = torch.ones((), device=self._device)
        self._parameters = list(model.parameters())
        self._velocity = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._recorded: dict[int, _Recorded] = {}

    def record(self, x: Tensor, y: Tensor, sizes: Sequence[int]) -> None:
        """Records the step for some sizes of batches; does nothing on a CPU. Weights and buffers change.

        Args:
            x: Images ``(n, 3, height, width)`` on the device, at least as many as the largest size.
            y: Labels ``(n,)``.
            sizes: Numbers of samples in a batch.
        """
        if self._device.type != "cuda":
            return
        for size in sorted(set(sizes) - set(self._recorded), reverse=True):
            self._recorded[size] = self._record(x[:size].clone(), y[:size].clone())

    def restart(self) -> None:
        """Forgets the momentum: the next step is the first of a training."""
        for speed in self._velocity:
            speed.zero_()

    def __call__(self, x: Tensor, y: Tensor, rate: float) -> None:
        """One step.

        Args:
            x: Images ``(batch, 3, height, width)`` on the device.
            y: Labels ``(batch,)``.
            rate: Learning rate.
        """
        self._rate.fill_(rate)
        recorded = self._recorded.get(len(y))
        if recorded is None:
            self._update(x, y)
            return
        recorded.x.copy_(x)
        recorded.y.copy_(y)
        recorded.graph.replay()

    def _record(self, x: Tensor, y: Tensor) -> _Recorded:
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._update(x, y)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._update(x, y)
        return _Recorded(graph, x, y)

    def _update(self, x: Tensor, y: Tensor) -> None:
        gradients = torch.autograd.grad(functional.cross_entropy(self._model(x), y), self._parameters)
        with torch.no_grad():
            for parameter, speed, gradient in zip(self._parameters, self._velocity, gradients, strict=True):
                torch.add(gradient, speed, alpha=self._momentum, out=speed)
                # The rate is a tensor, so that a recorded step can be given another one.
                parameter.addcmul_(speed, self._rate, value=-1.0)
