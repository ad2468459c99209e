"""Seconds and peak memory by phase, the same way for every system."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Phases:
    """Clocks of one system's work.

    Attributes:
        seconds: By phase, the device synchronised at both ends.
        peak_bytes: By phase: most memory allocated on a GPU, most resident memory on a CPU, where Linux tells it.
    """

    def __init__(self, device: str, *, memory: bool = True) -> None:
        """Starts with nothing.

        Args:
            device: ``cpu`` or ``cuda``.
            memory: Whether peaks are measured; without, blocks may lie inside those of other clocks, whose peaks stay.
        """
        self._gpu, self._memory = device.startswith("cuda"), memory
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures a block; a name used again adds its seconds. Blocks are not nested."""
        self._synchronise()
        if self._memory:
            self._reset_peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronise()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            peak = self._peak() if self._memory else None
            if peak is not None:
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), peak)

    def _synchronise(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            _RESET.write_text("5", encoding="ascii")
        except OSError:
            return

    def _peak(self) -> int | None:
        if self._gpu:
            return int(torch.cuda.max_memory_allocated()) + _held_by_graphs()
        try:
            lines = _STATUS.read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        found = [line.split() for line in lines if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024 if found else None


def _held_by_graphs() -> int:
    """Bytes that recorded steps keep in pools of their own: a replay allocates nothing, but they are needed."""
    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    return sum(part["total_size"] - part["allocated_size"] for part in pools)


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
