"""One walk over a data set: gradients of every sample, through any number of projectors, with bounded memory."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.devices import usable_device
from grass_lib.errors import UsageError
from grass_lib.gradients.full import PerSampleGradients, batch_size, batch_slice, batch_to
from grass_lib.gradients.masked import MaskedGradients
from grass_lib.gradients.order import WatchedLoader
from grass_lib.gradients.outputs import Batch
from grass_lib.gradients.state import ModelState
from grass_lib.projection import Projector

CPU_BUFFER_BYTES = 512 * 2**20
CUDA_BUFFER_BYTES = 4 * 2**30
_BAR_DELAY_SECONDS = 3.0


@dataclass
class PassTimings:
    """Seconds spent in a walk, measured with the device synchronised.

    Attributes:
        gradients: Loading the data and computing gradients.
        projection: By projector.
    """

    gradients: float = 0.0
    projection: dict[str, float] = field(default_factory=dict)

    def add_projection(self, name: str, seconds: float) -> None:
        """Adds seconds to one projector."""
        self.projection[name] = self.projection.get(name, 0.0) + seconds


def project_loader(
    gradients: PerSampleGradients | MaskedGradients,
    state: ModelState | Mapping[str, Tensor] | None,
    loader: Iterable[Batch],
    projectors: Mapping[str, Projector],
    *,
    buffer_bytes: int | None = None,
    store_device: str | torch.device | None = None,
    progress: "bool | tqdm" = True,
    timings: PassTimings | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Walks a loader once and projects the gradient of every sample by every projector.

    Rows of several batches are collected before they are projected, because dense projectors draw their matrix anew in
    every call. The buffer is the only thing of the rows' length per sample that is held.

    Args:
        gradients: Computes the rows ``(batch, p)``, or those of kept coordinates alone.
        state: The checkpoint, as in :class:`PerSampleGradients`.
        loader: Yields batches in a fixed order.
        projectors: By name; each sees the same rows.
        buffer_bytes: Size of the buffer; None for 512 MiB on a CPU and 4 GiB on a GPU. At least one row is held.
        store_device: Where the results are kept; None for the device of the gradients.
        progress: True shows a bar when the walk lasts more than 3 s, a bar is advanced by the number of samples.
        timings: Is added to.

    Returns:
        Features ``(n, k)`` by name and output values ``(n,)``, on ``store_device``.

    Raises:
        UsageError: If the loader yields nothing, or a batch has another form.
        GrassError: If a gradient is not finite.
    """
    timings = PassTimings() if timings is None else timings
    device, bound = gradients.device, state if isinstance(state, ModelState) else gradients.bind(state)
    place = device if store_device is None else usable_device(store_device)
    expected = sample_count(loader)
    buffer = _new_buffer(gradients, buffer_bytes, expected)
    features: dict[str, list[Tensor]] = {name: [] for name in projectors}
    values: list[Tensor] = []
    own_bar = isinstance(progress, bool)
    bar = progress_bar(expected, "gradients", progress) if isinstance(progress, bool) else progress
    filled, seen, mark = 0, 0, clock(device)

    def flush(rows: Tensor) -> float:
        timings.gradients += clock(device) - mark
        for name, projector in projectors.items():
            start = clock(device)
            projected = projector(rows)
            timings.add_projection(name, clock(device) - start)
            if projected.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                projected = projected.clone()  # an identity hands the buffer back, which is about to be overwritten
            features[name].append(projected.to(place))
        return clock(device)

    try:
        for batch in loader:
            samples = batch_to(batch, device)
            size = batch_size(samples)
            for start in range(0, size, len(buffer)):
                piece = batch_slice(samples, start, min(start + len(buffer), size))
                count = batch_size(piece)
                if filled + count > len(buffer):
                    mark = flush(buffer[:filled])
                    filled = 0
                _, found = gradients(bound, piece, out=buffer[filled : filled + count], first=seen)
                values.append(found)
                filled, seen = filled + count, seen + count
            bar.update(size)
        if not seen:
            raise UsageError("The loader yielded no samples; expected at least one. Check its data set and sampler.")
        if filled:
            flush(buffer[:filled])
    finally:
        if own_bar:
            bar.close()
    return {name: _joined(parts) for name, parts in features.items()}, torch.cat(values).to(place)


def progress_bar(total: int | None, description: str, shown: bool = True) -> "tqdm":
    """A bar over samples that appears only when the work lasts."""
    return tqdm(total=total, desc=description, unit="sample", disable=not shown, delay=_BAR_DELAY_SECONDS, leave=False)


def sample_count(loader: Iterable[Batch]) -> int | None:
    """Number of samples that a loader will yield, where it can be told without walking it."""
    loader = loader.loader if isinstance(loader, WatchedLoader) else loader
    sampler = getattr(loader, "sampler", None)
    if sampler is not None and hasattr(sampler, "__len__") and getattr(loader, "batch_size", None):
        return len(sampler)
    if isinstance(loader, list | tuple):
        return sum(batch_size(batch) for batch in loader)
    return None


def clock(device: torch.device) -> float:
    """Time in seconds once the device has finished what it was given; only differences mean anything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _new_buffer(gradients: PerSampleGradients | MaskedGradients, budget: int | None, expected: int | None) -> Tensor:
    if budget is None:
        budget = CUDA_BUFFER_BYTES if gradients.device.type == "cuda" else CPU_BUFFER_BYTES
    if budget < 1:
        raise UsageError(f"buffer_bytes is {budget}; expected a positive number of bytes.")
    rows = max(1, budget // (gradients.width * gradients.dtype.itemsize))
    if expected is not None:
        rows = min(rows, max(1, expected))
    return torch.empty(rows, gradients.width, device=gradients.device, dtype=gradients.dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
