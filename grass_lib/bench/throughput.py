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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.attribution.caching import ShardCache, default_shard_size, sample_bytes
from grass_lib.attribution.curvature import Curvature
from grass_lib.bench.throughput_check import cosines, kept_positions, score_agreement
from grass_lib.bench.throughput_model import BenchModel
from grass_lib.bench.throughput_rows import CHECKED, SCORED, Plan, Row
from grass_lib.bench.throughput_steps import Batch, Step, bare_step, plain_step, reference_step
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.gradients.language import causal_loss
from grass_lib.gradients.stream import clock
from grass_lib.specs import CompressionSpec
from grass_lib.store import GradientStore

logger = logging.getLogger(__name__)

_WARM_UP = 3


class Throughput:
    """Measures one plan on one model.

    Attributes:
        rows: What was measured so far.
        check: Comparison of written rows with an eager capture in float32.
        fp8: The same for rows with FP8 products, and how alike they rank samples; empty where there are none.
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
        self.fp8: dict[str, Any] = {}
        self._written: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}

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

    def run_fp8(self) -> Iterator[Row]:
        """Caching with FP8 products, row by row: whatever goes wrong there is a note, and later rows follow.

        To be run after `run`: an error of a GPU can spoil what comes after it in the process.
        """
        for size in self._plan.batches:
            first = size == self._plan.batches[0]
            yield (row := self._guarded_fp8(size, compiled=self._device.type == "cuda", kept=first))
            if first and row.tokens_per_second is None and self._device.type == "cuda":
                # What is there to learn without a compiler: the effect on scores above all.
                yield self._guarded_fp8(size, compiled=False, kept=True)

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

    def _guarded_fp8(self, size: int, *, compiled: bool, kept: bool) -> Row:
        torch._dynamo.reset()
        try:
            row = self._caching(self._plan.spec, size, head=True, kept=kept, fp8=True, compiled=compiled)
        except Exception as error:
            logger.warning("the row with fp8 products failed", exc_info=True)
            reason = (str(error).splitlines() or [""])[0]
            row = Row("caching", str(self._plan.spec), batch=size, fp8=True)
            row.note = f"failed{'' if compiled else ' (not compiled)'}: {type(error).__name__}: {reason}"[:300]
            for folder in self._plan.folder.glob("*-fp8"):
                shutil.rmtree(folder, ignore_errors=True)
        gc.collect()
        with suppress(RuntimeError):  # of a GPU that reports the failure again
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

    def _gradients(
        self, spec: CompressionSpec, head: bool, *, fp8: bool = False, compiled: bool = True
    ) -> FactoredGradients:
        return FactoredGradients(
            self._bench.model,
            chunked_causal_loss,
            include_head=head,
            compile="blocks" if compiled and self._device.type == "cuda" else False,
            timed=False,
            fp8=fp8,
            sparsification=str(spec.sparsification),
            projection=str(spec.projection),
        )

    def _caching(
        self,
        spec: CompressionSpec,
        size: int,
        *,
        head: bool,
        hessian: str = "Identity",
        kept: bool = False,
        fp8: bool = False,
        compiled: bool = True,
    ) -> Row:
        plan, gradients = self._plan, self._gradients(spec, head, fp8=fp8, compiled=compiled)
        row = Row("caching", str(spec), len(gradients.sizes), hessian, size, fp8=fp8)
        row.note = "not compiled" if not compiled and self._device.type == "cuda" else ""
        # Two shards of that size stay in pinned memory, which makes copies to the host wait for nothing.
        shard = default_shard_size(size, sample_bytes(gradients.sizes, torch.bfloat16))
        folder = plan.folder / f"{spec.slug}-{len(gradients.sizes)}-{size}-{hessian}{'-fp8' if fp8 else ''}"
        shutil.rmtree(folder, ignore_errors=True)
        store = GradientStore.create(
            folder,
            layers=gradients.sizes,
            n_samples=plan.samples,
            shard_size=shard,
            dtype=torch.bfloat16,
            fingerprint={"model": self._bench.name, "data": "random tokens", "spec": str(spec), "fp8": fp8},
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
        written = {name: rows[:SCORED].clone() for name, rows in store.read(0).items()} if kept and not problems else {}
        shutil.rmtree(folder, ignore_errors=True)
        if written and fp8:
            self._compare_fp8(written)
        elif written:
            self._written = written
            self.check = {
                "spec": str(spec),
                "mean_kept_position": kept_positions(gradients),
                "dtype": self._bench.dtype,
            }
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
        """Rows that were written against an eager capture in float32 of the same model, which is widened meanwhile."""
        if not self._written:
            return
        narrow = self._eager_rows(self._model)
        self._wanted = self._eager_rows(self._bench.widened())
        self._bench.narrowed()
        self.check |= {"rows": CHECKED, **cosines(_first(self._written), self._wanted)}
        # What the type of the weights itself costs, without anything of ours.
        self.check["eager"] = cosines(narrow, self._wanted)

    def _eager_rows(self, model: Any) -> dict[str, Tensor]:
        """Of transformers' model as it is, each sequence alone; on the host."""
        spec = self._plan.spec
        gradients = FactoredGradients(
            model,
            causal_loss,
            include_head=True,
            sparsification=str(spec.sparsification),
            projection=str(spec.projection),
            timed=False,
        )
        found = [{name: part.cpu() for name, part in gradients(dict(batch))[0].items()} for batch in self._rows_alone()]
        del gradients
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return {name: torch.cat([rows[name] for rows in found]) for name in self._written}

    def _compare_fp8(self, written: dict[str, Tensor]) -> None:
        """Rows with FP8 products against the eager capture in float32, and their scores against those without."""
        self.fp8 = {"spec": str(self._plan.spec)}
        if self._wanted:
            self.fp8 |= {"rows": CHECKED, **cosines(_first(written), self._wanted)}
            self.fp8 |= score_agreement(written, self._written)

    def _rows_alone(self) -> Iterator[Batch]:
        for ids in self._ids[:CHECKED].split(1):
            moved = ids.to(self._device)
            yield {"input_ids": moved, "labels": moved}

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None


def _first(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part[:CHECKED] for name, part in rows.items()}
