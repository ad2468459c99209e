"""`grass bench throughput`: tokens a second and memory of caching gradients of a language model, beside what it needs.

All rows come from one run on one device: the plain model, a step like the reference's, ours without capture, and ours
caching to disk. The rows that were written are checked against an eager capture in float32.
"""

from __future__ import annotations

import gc
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.attribution.caching import ShardCache
from grass_lib.attribution.curvature import Curvature
from grass_lib.bench.throughput_check import cosines, kept_positions
from grass_lib.bench.throughput_model import BenchModel
from grass_lib.bench.throughput_steps import Batch, Step, bare_step, plain_step, reference_step
from grass_lib.errors import UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.gradients.language import causal_loss
from grass_lib.gradients.stream import clock
from grass_lib.specs import CompressionSpec
from grass_lib.store import GradientStore

logger = logging.getLogger(__name__)

_WARM_UP = 3
CHECKED = 8
"""Rows that are compared with an eager capture in float32."""
_PINNED_SHARD = 2**28
"""Bytes of a shard: two of them stay in pinned memory, which makes copies to the host wait for nothing."""


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
        note: Why it was not measured.
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


class Throughput:
    """Measures one plan on one model.

    Attributes:
        rows: What was measured so far.
        check: Comparison of written rows with an eager capture in float32.
    """

    def __init__(self, model: BenchModel, plan: Plan, *, started: float | None = None) -> None:
        """Makes the batches; nothing is run.

        Args:
            model: The model, on its device.
            plan: What is measured.
            started: When the process started, seconds since the epoch; None where it is not known.
        """
        self._bench, self._plan, self._started = model, plan, started
        self._device = model.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.vocabulary, (plan.samples, plan.block), generator=generator)
        self._ids = ids.pin_memory() if self._device.type == "cuda" else ids
        self.rows: list[Row] = []
        self.check: dict[str, Any] = {}
        self._checked: dict[str, Tensor] = {}

    def run(self) -> Iterator[Row]:
        """Measures row by row; a row that does not fit into memory says so and the next one follows."""
        plan = self._plan
        # Ours first: how long the first batch takes from the start of the process is a figure of its own.
        for size in plan.batches:
            yield self._guarded("caching", size, lambda size=size: self._caching(plan.spec, size, head=False))
            first = size == plan.batches[0]
            yield self._guarded(
                "caching", size, lambda size=size, kept=first: self._caching(plan.spec, size, head=True, kept=kept)
            )
            if first:
                yield self._guarded(
                    "caching", size, lambda size=size: self._caching(plan.spec, size, head=True, hessian="eFIM")
                )
            yield self._guarded(
                "bare", size, lambda size=size: self._timed("bare", lambda: bare_step(self._model), size)
            )
            yield self._guarded(
                "plain", size, lambda size=size: self._timed("plain", lambda: plain_step(self._model), size)
            )
            # A compiler gives up on a block that it has compiled for many shapes.
            torch._dynamo.reset()
        if plan.other is not None:
            other, size = plan.other, plan.batches[-1]
            yield self._guarded("caching", size, lambda: self._caching(other, size, head=False))
        yield self._guarded("reference", plan.batches[0], self._reference)
        self._compare()

    @property
    def _model(self) -> Any:
        return self._bench.model

    def _guarded(self, step: str, size: int, measure: Callable[[], Row]) -> Row:
        try:
            row = measure()
        except torch.OutOfMemoryError as error:
            row = Row(step, batch=size, note=f"does not fit into memory: {str(error).splitlines()[0]}")
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        return row

    def _batches(self, size: int) -> Iterator[Batch]:
        for ids in self._ids.split(size):
            yield {"input_ids": ids, "labels": ids}

    def _moved(self, size: int) -> Batch:
        ids = self._ids[:size].to(self._device)
        return {"input_ids": ids, "labels": ids}

    def _gradients(self, spec: CompressionSpec, head: bool) -> FactoredGradients:
        return FactoredGradients(
            self._bench.model,
            chunked_causal_loss,
            include_head=head,
            compile="blocks" if self._device.type == "cuda" else False,
            timed=False,
            sparsification=str(spec.sparsification),
            projection=str(spec.projection),
        )

    def _caching(
        self, spec: CompressionSpec, size: int, *, head: bool, hessian: str = "Identity", kept: bool = False
    ) -> Row:
        plan, gradients = self._plan, self._gradients(spec, head)
        row = Row("caching", str(spec), len(gradients.sizes), hessian, size)
        row_bytes = 2 * gradients.k
        shard = max(size, min(plan.samples, _PINNED_SHARD // row_bytes) // size * size)
        folder = plan.folder / f"{spec.slug}-{len(gradients.sizes)}-{size}-{hessian}"
        shutil.rmtree(folder, ignore_errors=True)
        store = GradientStore.create(
            folder,
            layers=gradients.sizes,
            n_samples=plan.samples,
            shard_size=shard,
            dtype=torch.bfloat16,
            fingerprint={"model": self._bench.name, "data": "random tokens", "spec": str(spec)},
        )
        self._reset_peak()
        with gradients.attached():
            batch = self._moved(size)
            start = clock(self._device)
            gradients(batch)
            row.first_batch_seconds = clock(self._device) - start
            row.since_start_seconds = None if self._started is None else time.time() - self._started
            capture = self._median(gradients, batch)
            curvature = Curvature(gradients.sizes, self._device) if hessian == "eFIM" else None
            cache = ShardCache(gradients, store, curvature)
            start = clock(self._device)
            with tqdm(total=plan.samples, desc="caching", unit="sample", leave=False, delay=3.0) as bar:
                cache.run(self._batches(size), bar)
            total = clock(self._device) - start
        steps = plan.samples / size
        row.tokens_per_second = plan.samples * plan.block / (total - cache.drain)
        row.peak_bytes = self._peak()
        row.seconds = {
            "step": (total - cache.drain) / steps,
            "capture": capture,
            "transfer": cache.transfer_seconds / steps,
            "write": (cache.seconds["writing"] - cache.drain) / steps,
            "curvature": cache.seconds["curvature"] / steps,
            "drain": cache.drain,
        }
        problems = [problem.message for problem in store.verify(progress=False)]
        row.stored = {
            "rows": store.n_samples,
            "layers": len(store.layers),
            "k": gradients.k,
            "bytes": store.stored_bytes,
        }
        row.stored["problems"] = problems
        if kept and not problems:
            self.check = {
                "spec": str(spec),
                "mean_kept_position": kept_positions(gradients),
                "dtype": self._bench.dtype,
            }
            self._checked = {name: rows[:CHECKED].clone() for name, rows in store.read(0).items()}
        shutil.rmtree(folder, ignore_errors=True)
        return row

    def _timed(self, name: str, build: Callable[[], AbstractContextManager[Step]], size: int, **facts: Any) -> Row:
        row = Row(name, batch=size, **facts)
        self._reset_peak()
        with build() as step:
            batch = self._moved(size)
            start = clock(self._device)
            step(batch)
            row.first_batch_seconds = clock(self._device) - start
            row.seconds = {"step": self._median(step, batch)}
        row.tokens_per_second = size * self._plan.block / row.seconds["step"]
        row.peak_bytes = self._peak()
        return row

    def _reference(self) -> Row:
        plan, gradients = self._plan, self._gradients(self._plan.spec, True)
        facts = {"spec": str(plan.spec), "layers": len(gradients.sizes)}
        return self._timed("reference", lambda: reference_step(self._model, gradients), plan.batches[0], **facts)

    def _median(self, step: Callable[[Batch], Any], batch: Batch) -> float:
        """Median seconds of a step, the device finished after each."""
        for _ in range(_WARM_UP - 1):
            step(batch)
        seconds = []
        for _ in range(self._plan.steps):
            start = clock(self._device)
            step(batch)
            seconds.append(clock(self._device) - start)
        return statistics.median(seconds)

    def _compare(self) -> None:
        """Rows that were written against an eager capture in float32 of the same model, which is then of that type."""
        if not self._checked:
            return
        spec, model = self._plan.spec, self._bench.widened()
        gradients = FactoredGradients(
            model,
            causal_loss,
            include_head=True,
            sparsification=str(spec.sparsification),
            projection=str(spec.projection),
            timed=False,
        )
        exact = [gradients(dict(batch))[0] for batch in list(self._rows_alone())]
        wanted = {name: torch.cat([rows[name].cpu() for rows in exact]) for name in self._checked}
        self.check |= {"rows": CHECKED, **cosines(self._checked, wanted)}

    def _rows_alone(self) -> Iterator[Batch]:
        for ids in self._ids[:CHECKED].split(1):
            moved = ids.to(self._device)
            yield {"input_ids": moved, "labels": moved}

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain values."""
    return [asdict(row) for row in rows]
