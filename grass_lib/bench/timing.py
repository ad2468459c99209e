"""Timing on a GPU by device events, on a CPU by the clock; and the speed of reading memory, the yardstick."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc

_WARM_UP = 3
_HEAD_START = 2_000_000  # cycles that the device waits, so that no launch is measured
_READ_BYTES = 4 << 30


@dataclass(frozen=True)
class Timing:
    """Times of one call, ms.

    Attributes:
        median: The middle one.
        low: The 10th percentile.
        high: The 90th percentile.
        repeats: How many were taken.
    """

    median: float
    low: float
    high: float
    repeats: int


def measure(call: Callable[[Tensor], object], inputs: Sequence[Tensor], repeats: int) -> Timing:
    """Times ``call`` on inputs in turn, after a warm-up; results are dropped.

    Args:
        call: What to time.
        inputs: Several, together larger than the cache, so that no call finds its input there.
        repeats: Number of timed calls.
    """
    for i in range(_WARM_UP):
        call(inputs[i % len(inputs)])
    times: list[float] = []
    if inputs[0].device.type != "cuda":
        for i in range(repeats):
            start = time.perf_counter()
            call(inputs[i % len(inputs)])
            times.append(1e3 * (time.perf_counter() - start))
    else:
        torch.cuda.synchronize()
        pairs = []
        for i in range(repeats):
            torch.cuda._sleep(_HEAD_START)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call(inputs[i % len(inputs)])
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in pairs]
    times.sort()
    return Timing(
        statistics.median(times), times[len(times) // 10], times[min(len(times) - 1, len(times) * 9 // 10)], len(times)
    )


def read_speed(device: torch.device, repeats: int = 20) -> float:
    """Measured speed of reading device memory once, bytes/s: the best of a plain kernel with several grids."""
    x = torch.empty(_READ_BYTES // 4, device=device).normal_()
    out = torch.empty(1, dtype=torch.int32, device=device)
    kernel = nvrtc.kernel("read.cu", "read_all", "PlP", {"IN": 0, "OUT": 0}, device)
    best = 0.0
    for blocks in (2, 4, 8, 32):
        grid = (blocks * nvrtc.processors(device),)

        def read(values: Tensor, grid: tuple[int, ...] = grid) -> None:
            kernel.launch(grid, 512, 0, (values.data_ptr(), values.numel() // 4, out.data_ptr()))

        best = max(best, _READ_BYTES / (1e-3 * measure(read, [x], repeats).median))
    return best
