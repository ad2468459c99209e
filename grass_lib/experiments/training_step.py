"""One step of AdamW, on a GPU recorded as a CUDA graph: hundreds of kernels cost one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Tensor], Tensor]
_WARM_UP = 3


class TrainingStep:
    """Steps on batches of token blocks; the weights change in place.

    On a GPU the first full batch records forward pass, backward pass and update together, and every later one replays
    them; batches of another size run kernel by kernel. Random numbers (dropout) come from PyTorch's generator of the
    device in both cases, so a seed decides them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        batch_size: int,
        weight_decay: float,
        plain: Loss | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """Prepares a step; nothing runs.

        Args:
            model: Stays where it is.
            loss: ``loss(model, ids (batch, length))``, the mean of a batch.
            batch_size: Of the batches that are recorded.
            weight_decay: Of AdamW.
            plain: The loss for batches of another size, where ``loss`` is compiled for one; None for ``loss``.
            betas: Of AdamW.
        """
        self.model, self._loss, self._plain = model, loss, plain or loss
        self._batch_size = batch_size
        self._options: dict[str, Any] = {"weight_decay": weight_decay, "betas": betas, "fused": True}
        self._device = next(model.parameters()).device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ids: Tensor | None = None
        self._optimizer: Any = None

    def restart(self, example: Tensor) -> None:
        """Starts a training: the optimizer forgets. On a GPU the first call records the step, which changes weights.

        Args:
            example: Blocks ``(n, length)`` on the device, of the kind that will come.
        """
        if self._device.type != "cuda":
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1.0, **self._options)
            return
        if self._optimizer is None:
            rate = torch.ones((), device=self._device)
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, capturable=True, **self._options)
        if self._graph is None and len(example) >= self._batch_size:
            self._record(example[: self._batch_size])
        for state in self._optimizer.state.values():
            for value in state.values():
                value.zero_()

    def __call__(self, ids: Tensor, rate: float) -> None:
        """One step.

        Args:
            ids: Blocks, int64 ``(batch, length)`` on the device.
            rate: Learning rate.
        """
        group = self._optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if self._graph is not None and self._ids is not None and ids.shape == self._ids.shape:
            self._ids.copy_(ids)
            self._graph.replay()
        else:
            self._update(self._loss if len(ids) == self._batch_size else self._plain, ids)

    def _record(self, ids: Tensor) -> None:
        self._ids = ids.clone()
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._update(self._loss, self._ids)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Gradients that do not exist yet are made in the graph's own memory, and overwritten by every replay.
            self._loss(self.model, self._ids).backward()
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._graph = graph

    def _update(self, loss: Loss, ids: Tensor) -> None:
        loss(self.model, ids).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
