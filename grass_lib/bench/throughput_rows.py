"""What `grass bench throughput` measures, and one line of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grass_lib.errors import UsageError
from grass_lib.specs import CompressionSpec

CHECKED = 8
"""Rows that are compared with an eager capture in float32."""
SCORED = 64
"""Rows at most whose scores with and without FP8 products are compared."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        step: ``plain``, ``reference``, ``bare`` or ``caching``.
        spec: Compression; empty where nothing is captured.
        layers: Captured layers.
        hessian: ``eFIM`` where the curvature was summed on the device.
        batch: Sequences in a step.
        tokens_per_second: Of the steady state: without the first steps, and without the wait for the last shard.
        peak_bytes: Most memory of the device that was allocated.
        seconds: By part of the work, a step: ``step``, and for caching ``capture``, ``transfer``, ``write``.
        first_batch_seconds: Of the first step, compilation included.
        since_start_seconds: From the start of the process to the end of the first step.
        stored: What was written and what the check of the store said.
        note: Why it was not measured, or what was special.
        fp8: Whether the products of the blocks' linear layers ran in FP8.
    """

    step: str
    spec: str = ""
    layers: int = 0
    hessian: str = ""
    batch: int = 0
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    first_batch_seconds: float | None = None
    since_start_seconds: float | None = None
    stored: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    fp8: bool = False


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        spec: The compression of interest.
        other: Another one beside it; None for none.
        batches: Sequences in a step, the smaller sizes first.
        block: Tokens in a sequence.
        samples: Sequences that each caching row writes.
        steps: Timed steps of the other rows.
        folder: Where stores are written; each is removed after its check.

    Raises:
        UsageError: A number is too small, or the samples are no multiple of the batches.
    """

    spec: CompressionSpec
    other: CompressionSpec | None
    batches: tuple[int, ...]
    block: int
    samples: int
    steps: int
    folder: Path

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or self.block < 2 or self.steps < 1:
            raise UsageError(
                f"batches {self.batches}, block {self.block}, steps {self.steps}; expected batches and steps of 1 "
                "or more, and blocks of 2 tokens or more"
            )
        wrong = [size for size in self.batches if self.samples % size or self.samples < CHECKED]
        if wrong:
            raise UsageError(
                f"samples is {self.samples}; expected {CHECKED} or more, and a multiple of each batch, {self.batches}"
            )


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [asdict(row) for row in rows]
