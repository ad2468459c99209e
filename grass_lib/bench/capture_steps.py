"""Steps of the capture benchmark, on one batch again and again: the passes alone, with capture, and training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from scipy import stats
from torch import Tensor

from grass_lib.attribution.curvature import RowBlock
from grass_lib.gradients import FactoredGradients, causal_loss
from grass_lib.gradients.graph import RecordedStep
from grass_lib.specs import CompressionSpec

Batch: TypeAlias = dict[str, Tensor]
Step: TypeAlias = Callable[[Batch], None]
ROUNDS, REPEATS, WARM = 40, 20, 3
IN_A_ROW = 5
"""Calls that are timed together: a walk over a data set never waits for the device between steps."""
WARM_SECONDS, TURNS_SECONDS = 2.0, 15.0
"""Of a GPU: how long it runs before turns are timed, since its clock falls first, and how long turns last at least."""


@contextmanager
def activations_step(model: Any, compiled: bool) -> Iterator[Step]:
    """Forward and backward pass to the embeddings' output with all weights frozen, nothing captured.

    Args:
        model: Of transformers.
        compiled: Compiles the pass and, on a GPU, records the step, as the caching step is.
    """
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()

    def values(embedded: Tensor, labels: Tensor) -> Tensor:
        return causal_loss(model, {"inputs_embeds": embedded, "labels": labels})

    run = torch.compile(values, dynamic=False) if compiled else values

    def plain(batch: Any) -> tuple[Batch, Tensor]:
        embedded = embeddings(batch["input_ids"]).detach().requires_grad_()
        found = run(embedded, batch["labels"])
        gradient = torch.autograd.grad(found.sum(), embedded)[0]
        # Results of a recorded step are kept: one number of the gradient stands for it.
        return {"embedded": gradient[:, 0, :1]}, found.detach()

    recorded: list[RecordedStep] = []

    def step(batch: Batch) -> None:
        if not (compiled and batch["labels"].is_cuda):
            plain(batch)
            return
        if not recorded:
            recorded.append(RecordedStep(plain, batch))
        recorded[0](batch)

    yield step


@contextmanager
def caching_step(model: Any, compiled: bool, spec: CompressionSpec, size: int) -> Iterator[Step]:
    """Our step: compressed per-sample gradients of all linear layers but the last, rounded to bfloat16 for a store.

    Args:
        model: Of transformers.
        compiled: Compiles the pass and, on a GPU, records the step.
        spec: The compression.
        size: Samples in a batch.
    """
    factored = FactoredGradients(
        model,
        causal_loss,
        sparsification=str(spec.sparsification),
        projection=str(spec.projection),
        compile=compiled,
        timed=False,
    )
    block = RowBlock(factored.sizes, size, torch.bfloat16, factored.device)

    def step(batch: Batch) -> None:
        gradients, _ = factored(batch)
        first = 0
        while first < size:
            first = block.append(gradients, first)
            block.filled = 0

    # Not inside `attached`: the passes alone are timed between calls, on the model as it is.
    yield step


@contextmanager
def training_step(model: Any) -> Iterator[Step]:
    """The gradients of all weights, by the model of transformers, not compiled: the floor of systems that form them."""
    model.requires_grad_(True)

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        causal_loss(model, batch).sum().backward()

    try:
        yield step
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)


def seconds_of(step: Step, batch: Batch, calls: int = IN_A_ROW) -> float:
    """Of one step among some in a row, on a GPU by its own clock."""
    if not batch["labels"].is_cuda:
        start = time.perf_counter()
        for _ in range(calls):
            step(batch)
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        step(batch)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def by_turns(base: Step, step: Step, batch: Batch, rounds: int = ROUNDS) -> tuple[float, float]:
    """Speed of a step as a share of another one's, both by turns: a device that gets warm runs slower.

    Args:
        base: The other one.
        step: The step.
        batch: For both.
        rounds: Of some calls of each in a row, at least 2; more where a GPU does them in a few seconds.

    Returns:
        Mean over the rounds, and half of its 95 % interval.
    """

    def turn(place: int) -> float:
        taken = {which: seconds_of(which, batch) for which in ((base, step) if place % 2 == 0 else (step, base))}
        return taken[base] / taken[step]

    for warm in (base, base, base, step):
        warm(batch)
    start, on_gpu, ratios = time.perf_counter(), batch["labels"].is_cuda, list[float]()
    while on_gpu and time.perf_counter() - start < WARM_SECONDS:
        turn(0)
    start = time.perf_counter()
    while len(ratios) < rounds or (on_gpu and time.perf_counter() - start < TURNS_SECONDS):
        ratios.append(turn(len(ratios)))
    quantile = float(stats.t.ppf(0.975, len(ratios) - 1))
    return statistics.mean(ratios), quantile * statistics.stdev(ratios) / len(ratios) ** 0.5


def measure(step: Step, batch: Batch, repeats: int = REPEATS) -> tuple[float, int | None]:
    """Median seconds of a step, and the bytes that it needs on a GPU: allocated at most, recordings with all they hold.

    Args:
        step: The step.
        batch: For each call.
        repeats: Timed calls, in portions of some in a row.
    """
    portions = -(-repeats // IN_A_ROW)
    for _ in range(WARM):
        step(batch)
    if not batch["labels"].is_cuda:
        return statistics.median(seconds_of(step, batch) for _ in range(portions)), None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = [seconds_of(step, batch) for _ in range(portions)]
    # A replayed graph allocates nothing: its memory is a pool of its own, which it keeps.
    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    held = sum(part["total_size"] - part["allocated_size"] for part in pools)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() + held
