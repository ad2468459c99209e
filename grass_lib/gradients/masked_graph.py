"""The pass of a micro-batch, recorded when its shape recurs and replayed for every checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import GrassError
from grass_lib.gradients.capturing import CapturedGraphs, Replay, noticing_waits
from grass_lib.gradients.graph import shapes_of, tensors_of
from grass_lib.gradients.outputs import Batch
from grass_lib.gradients.state import ModelState, copy_onto

Step: TypeAlias = Callable[[ModelState, Batch, Tensor, Tensor], bool]
"""``step(state, samples, rows, values)`` writes the last two, ``(n, k)`` and ``(n,)``, and says whether it may be
recorded."""
Capture: TypeAlias = Callable[[Callable[[], None]], Replay]
Waits: TypeAlias = Callable[[], AbstractContextManager[list[str]]]
_MOST_SHAPES = 4
_MOST_SEEN = 256
_COMPARED = 1 << 18
_LOG = logging.getLogger(__name__)


class StaticState:
    """Weights and buffers that stay where they are: checkpoints are copied into them."""

    def __init__(self, state: ModelState) -> None:
        """Takes names, shapes and types from a checkpoint."""
        self.state = ModelState(*({name: value.clone() for name, value in part.items()} for part in _parts(state)))
        self._layout = _layout(state)

    def fits(self, state: ModelState) -> bool:
        """Whether a checkpoint has the same names, shapes and types."""
        return _layout(state) == self._layout

    def load(self, state: ModelState) -> None:
        """Copies a checkpoint that fits."""
        for mine, given in zip(_parts(self.state), _parts(state), strict=True):
            copy_onto(list(mine.values()), [given[name] for name in mine])


@dataclass
class Shared:
    """What gradients at other coordinates of the same model share.

    Attributes:
        static: None until something is recorded.
        refused: Why nothing can be recorded; None where it can.
    """

    static: StaticState | None = None
    refused: str | None = None


@dataclass(frozen=True, eq=False)
class _Recording:
    static: StaticState
    inputs: Batch
    rows: Tensor
    values: Tensor
    replay: Replay


class Recordings:
    """Recordings of one step by the shape of its micro-batch.

    A shape is recorded when it comes for the second time: the step runs once more as it is, which gives the results
    and shows whether it waits for the device; then it is recorded, and the first replay is compared with the results.
    Where anything of this fails a warning is logged, and nothing is recorded from then on.

    Settings of PyTorch that choose kernels belong to the shape. At most four shapes are recorded.
    """

    def __init__(
        self,
        device: torch.device,
        shared: Shared,
        capture: Callable[[torch.device], Capture] = CapturedGraphs,
        waits: Waits = noticing_waits,
    ) -> None:
        """Nothing is recorded yet.

        Args:
            device: Of the computation.
            shared: With other recordings of the same model.
            capture: ``capture(device)(step)`` records a function and returns what replays it.
            waits: Notes where the host waits for the device.
        """
        self._device, self.shared, self._capture, self._waits = device, shared, capture, waits
        self._forget()

    def __len__(self) -> int:
        """How many shapes are recorded."""
        return len(self._made)

    def renewed(self) -> Recordings:
        """Recordings of another step of the same model."""
        return Recordings(self._device, self.shared, self._capture, self._waits)

    def begin(self) -> None:
        """A call begins: weights may have changed in place since the last one."""
        self._loaded = None

    def recurs(self, samples: Batch) -> bool:
        """Whether the shape of a micro-batch came before; it is noted."""
        key = _key(samples)
        known = key in self._seen
        if not known and len(self._seen) < _MOST_SEEN:
            self._seen.add(key)
        return known and self.shared.refused is None

    def __call__(
        self, state: ModelState, samples: Batch, rows: Tensor, values: Tensor, *, eager: Step, step: Step
    ) -> bool:
        """Does one micro-batch.

        Args:
            state: The checkpoint.
            samples: The micro-batch, whose shape came before.
            rows: Is written to, ``(n, k)``.
            values: Is written to, ``(n,)``.
            eager: The step as it is, which may find out that it may not be recorded.
            step: The step that is recorded.

        Returns:
            Whether the results are from a replay; otherwise they are from ``eager``.
        """
        key = _key(samples)
        if key not in self._made and len(self._made) == _MOST_SHAPES:
            eager(state, samples, rows, values)
            return False
        static = self._static(state)
        recording = self._made.get(key)
        if recording is None:
            self._record(key, static, samples, rows, values, eager, step)
            return False
        copy_onto(tensors_of(recording.inputs), tensors_of(samples))
        recording.replay()
        rows.copy_(recording.rows)
        values.copy_(recording.values)
        return True

    def _record(
        self, key: Any, static: StaticState, samples: Batch, rows: Tensor, values: Tensor, eager: Step, step: Step
    ) -> None:
        inputs = _clones(samples)
        with self._waits() as waits:
            settled = eager(static.state, inputs, rows, values)
        if not settled:
            return None
        if waits:
            return self._refuse(f"it waits for the device, at {waits[0]}")
        own_rows, own_values = torch.empty_like(rows), torch.empty_like(values)

        def recorded() -> None:
            if not step(static.state, inputs, own_rows, own_values):
                raise GrassError("the pass came out differently when it was repeated")

        try:
            replay = self._graphs(recorded)
            replay()
        except (GrassError, RuntimeError) as error:
            return self._refuse(str(error))
        if not (_same(own_rows, rows) and _same(own_values, values)):
            return self._refuse("a replay gave other numbers than the pass itself")
        self._made[key] = _Recording(static, inputs, own_rows, own_values, replay)
        return None

    def _static(self, state: ModelState) -> StaticState:
        """The state that recordings read, with a checkpoint's numbers in it."""
        shared = self.shared
        if shared.static is None or not shared.static.fits(state):
            shared.static = StaticState(state)
        elif self._loaded is not state:
            shared.static.load(state)
        self._loaded = state
        if any(recording.static is not shared.static for recording in self._made.values()):
            self._forget()
            self._loaded = state
        return shared.static

    def _refuse(self, reason: str) -> None:
        self.shared.refused, self.shared.static = reason, None
        self._forget()
        _LOG.warning("The pass is not recorded as a CUDA graph and runs as it is, which may be slower: %s.", reason)

    def _forget(self) -> None:
        self._graphs = self._capture(self._device)
        self._made: dict[Any, _Recording] = {}
        self._seen: set[Any] = set()
        self._loaded: ModelState | None = None


def _parts(state: ModelState) -> tuple[dict[str, Tensor], ...]:
    return state.trainable, state.fixed, state.buffers


def _layout(state: ModelState) -> list[dict[str, tuple[torch.Size, torch.dtype]]]:
    return [{name: (value.shape, value.dtype) for name, value in part.items()} for part in _parts(state)]


def _clones(samples: Batch) -> Batch:
    if isinstance(samples, Mapping):
        return {name: value.clone() for name, value in samples.items()}
    return tuple(value.clone() for value in samples)


def _key(samples: Batch) -> tuple[object, ...]:
    """What a recording is bound to: shapes of the micro-batch and settings that choose kernels."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return (
        shapes_of(samples),
        # In newer versions of PyTorch the older name of the setting raises where both were used.
        *(_precision(setting) for setting in (matmul, cudnn, getattr(cudnn, "conv", cudnn))),
        getattr(torch.backends, "fp32_precision", None),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )


def _precision(setting: Any) -> object:
    return setting.fp32_precision if hasattr(setting, "fp32_precision") else setting.allow_tf32


def _same(found: Tensor, wanted: Tensor) -> bool:
    """Equal up to the order of sums; to the bit where PyTorch is asked for deterministic algorithms."""
    # Some rows at a time: recording must not take much more memory than the pass.
    step = max(1, _COMPARED // max(1, wanted[:1].numel()))
    pieces = list(zip(found.split(step), wanted.split(step), strict=True))
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return all(torch.allclose(*piece, rtol=0, atol=0, equal_nan=True) for piece in pieces)
    scale = max(float(torch.nan_to_num(piece, posinf=0, neginf=0).abs().max()) for _, piece in pieces)
    return all(torch.allclose(*piece, rtol=1e-2, atol=1e-3 * scale, equal_nan=True) for piece in pieces)
