"""Steps recorded once as CUDA graphs and replayed: hundreds of short kernels cost one launch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients.capturing import CapturedGraphs
from grass_lib.gradients.outputs import Batch
from grass_lib.kernels.columns import ColumnsMoved, beside

logger = logging.getLogger(__name__)

Step = Callable[[Batch], tuple[dict[str, Tensor], Tensor]]


class RecordedStep:
    """Replays a step on batches of one shape.

    The step must not wait for the device, and must compute everything from its inputs and tensors that stay where they
    are. Weights may change in place between replays.

    Attributes:
        shapes: Names, shapes and types of a batch, as `shapes_of` gives them.
    """

    def __init__(self, step: Step, samples: Batch) -> None:
        """Runs the step twice to warm it up, then records it.

        Args:
            step: Gives named rows ``(batch, k)`` and values ``(batch,)``.
            samples: A batch on the GPU.

        Raises:
            UsageError: The step cannot be recorded; the message says why.
        """
        self.shapes = shapes_of(samples)
        self._inputs: Batch
        if isinstance(samples, Mapping):
            self._inputs = {name: value.clone() for name, value in samples.items()}
        else:
            self._inputs = tuple(value.clone() for value in samples)
        device = tensors_of(samples)[0].device
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                step(self._inputs)
        current.wait_stream(stream)
        found = None
        with beside(device), suppress(ColumnsMoved):
            found = self._record(step, device)
        if found is None:
            logger.info(
                "kept columns are not copied beside the recorded step: its code does not hold their tensors meanwhile"
            )
            found = self._record(step, device)
        self._rows, self._values = found

    def _record(self, step: Step, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        found: list[tuple[dict[str, Tensor], Tensor]] = []
        try:
            self._recorded = CapturedGraphs(device)(lambda: found.append(step(self._inputs)))
        except GrassError as error:
            if isinstance(error.__cause__, ColumnsMoved):
                raise error.__cause__ from None
            raise UsageError(f"this step cannot be recorded as a CUDA graph: {error}. Use graph=False") from error
        return found[0]

    def fits(self, samples: Batch) -> bool:
        """Whether a batch has the shapes that were recorded."""
        return shapes_of(samples) == self.shapes

    def __call__(self, samples: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The step's results for another batch of the same shapes; they are the caller's own."""
        for own, given in zip(tensors_of(self._inputs), tensors_of(samples), strict=True):
            own.copy_(given, non_blocking=True)
        self._recorded()
        rows = {
            name: torch.empty_like(part, memory_format=torch.contiguous_format) for name, part in self._rows.items()
        }
        torch._foreach_copy_(list(rows.values()), list(self._rows.values()))  # pyright: ignore[reportPrivateImportUsage]
        return rows, self._values.clone()


def tensors_of(samples: Batch) -> list[Tensor]:
    """Tensors of a batch in an order that does not depend on how it was put together."""
    return [samples[name] for name in sorted(samples)] if isinstance(samples, Mapping) else list(samples)


def shapes_of(samples: Batch) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """What a recorded step is bound to: names, shapes and types of a batch."""
    names = sorted(samples) if isinstance(samples, Mapping) else [str(place) for place in range(len(samples))]
    tensors = tensors_of(samples)
    return tuple((name, tuple(value.shape), value.dtype) for name, value in zip(names, tensors, strict=True))
