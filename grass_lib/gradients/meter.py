"""Seconds of many short pieces of work, without waiting for the device in between."""

from __future__ import annotations

import time

import torch

# Pairs of events that are kept before they are added up; events cost memory on the device's driver.
_PAIRS = 4096


class Meter:
    """Adds up the time between `start` and `stop`: of the device's stream on a GPU, of the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Starts at 0.

        Args:
            device: Where the work runs.
        """
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._begin: float | torch.cuda.Event = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begins a piece; pieces do not nest."""
        self._begin = self._now()

    def stop(self) -> None:
        """Ends the piece."""
        end = self._now()
        if isinstance(end, float) and isinstance(self._begin, float):
            self._seconds += end - self._begin
        elif isinstance(end, torch.cuda.Event) and isinstance(self._begin, torch.cuda.Event):
            self._pairs.append((self._begin, end))
            if len(self._pairs) >= _PAIRS:
                self._drain()

    def reset(self) -> None:
        """Starts at 0 again."""
        self._seconds = 0.0
        self._pairs.clear()

    @property
    def seconds(self) -> float:
        """The sum so far; waits for the device."""
        self._drain()
        return self._seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _drain(self) -> None:
        for begin, end in self._pairs:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._pairs.clear()


class measured:
    """Counts a block with a meter; does nothing where there is none."""

    def __init__(self, meter: Meter | None) -> None:
        """Takes the meter."""
        self._meter = meter

    def __enter__(self) -> None:
        if self._meter is not None:
            self._meter.start()

    def __exit__(self, *_: object) -> None:
        if self._meter is not None:
            self._meter.stop()


class StepClock:
    """Seconds of steps that are repeated over batches; the first batch, with all that is made at first, counts apart.

    Attributes:
        stage1: Of stage 1; None where it cannot be told apart.
        stage2: Of stage 2.
        total: Of forward and backward pass, stage 1 included.
    """

    def __init__(self, device: torch.device, *, stage1: bool) -> None:
        """Starts at 0.

        Args:
            device: Where the work runs.
            stage1: Whether stage 1 is measured.
        """
        self.stage1 = Meter(device) if stage1 else None
        self.stage2, self.total = Meter(device), Meter(device)
        self._samples = self._first_samples = 0
        self._first: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far: ``gradients`` (forward, backward) and ``compression`` (both stages)."""
        first = 0.0 if self.stage1 is None else self.stage1.seconds
        return {"gradients": max(0.0, self.total.seconds - first), "compression": first + self.stage2.seconds}

    @property
    def timings(self) -> dict[str, float]:
        """The same, with the first batch counted like the later ones, by its samples."""
        seconds, later = self.seconds, self._samples - self._first_samples
        if later > 0:
            seconds = {name: (value - self._first[name]) * self._samples / later for name, value in seconds.items()}
        return seconds

    def count(self, n: int) -> None:
        """Says that a batch of ``n`` samples is done."""
        if not self._samples:
            self._first, self._first_samples = self.seconds, n
        self._samples += n

    def restart(self) -> None:
        """Starts at 0 again."""
        for meter in filter(None, (self.stage1, self.stage2, self.total)):
            meter.reset()
        self._samples = self._first_samples = 0
        self._first = {}
