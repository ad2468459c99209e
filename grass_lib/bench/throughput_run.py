"""Runs the throughput benchmark: plan, measurement, goals, JSON and a table as text."""

from __future__ import annotations

import datetime
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grass_lib.bench.results import goal_line, judged, versions, write
from grass_lib.bench.throughput import Throughput
from grass_lib.bench.throughput_model import build, product_speed
from grass_lib.bench.throughput_rows import Plan, Row, as_json
from grass_lib.errors import UsageError
from grass_lib.experiments.base import resolve_device
from grass_lib.specs import CompressionSpec

logger = logging.getLogger(__name__)

SCHEMA = 1
FACTGRASS, LOGRA = "random_mask-128*128->sjlt-4096", "normal-64*64->identity"
BLOCK = 1024
"""Tokens in a sequence."""
FASTER, COSINE = 1.35, 0.99
"""Goals on one H100 at the shape of Llama-3.1-8B: times the plain model, and the worst cosine of a written row."""
MEMORY = {"Identity": 32e9, "eFIM": 48e9}
"""Goals for the peak at the smallest batch, bytes."""
FIRST_BATCH = 60.0


def run(
    model: str = "llama-3.1-8b",
    *,
    weights: str = "random",
    dtype: str = "bfloat16",
    spec: str = FACTGRASS,
    other: str = LOGRA,
    batches: Sequence[int] = (4, 8),
    block: int = BLOCK,
    samples: int = 256,
    steps: int = 8,
    device: str = "auto",
    folder: Path,
    fp8: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures everything; what was measured is written after every row.

    Args:
        model: A shape, a model of the hub or a folder.
        weights: ``random`` or ``pretrained``.
        dtype: Of the weights.
        spec: The compression of interest.
        other: Another beside it; empty for none.
        batches: Sequences in a step.
        block: Tokens in a sequence.
        samples: Sequences that each caching row writes.
        steps: Timed steps of the other rows.
        device: ``auto``, ``cuda`` or ``cpu``.
        folder: Where stores are written for a while.
        fp8: Measures caching with FP8 products too, after everything else.
        out: Where the JSON goes; None for nowhere.

    Raises:
        UsageError: An argument does not fit.
        SpecError: A compression cannot be parsed.
        DataError: The model cannot be had.
    """
    plan = Plan(
        spec=parsed_spec(spec),
        other=parsed_spec(other) if other else None,
        batches=tuple(sorted(set(batches))),
        block=block,
        samples=samples,
        steps=steps,
        folder=Path(folder),
    )
    place = torch.device(resolve_device(device))
    gpu, started = place.type == "cuda", _process_start()
    if gpu:
        torch.set_float32_matmul_precision("highest")
    found = build(model, weights=weights, dtype=dtype, device=place)
    facts = found.facts(block)
    bench = Throughput(found, plan, started=started)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "grass bench throughput",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(place) if gpu else platform.machine(),
        "device_type": place.type,
        "versions": versions("transformers", "triton", "cuda-bindings"),
        "model": facts,
        "spec": str(plan.spec),
        "block": block,
        "samples": samples,
        "product_operations_per_second": None,
        "rows": [],
        "check": {},
        "fp8": {},
        "goals": [],
    }

    def follow(rows: Iterator[Row]) -> bool:
        """Notes row by row; whether all were measured."""
        try:
            for row in rows:
                result["rows"], result["fp8"] = as_json(bench.rows), bench.fp8
                logger.info("%s", row_text(row))
                if out is not None:
                    write(result, out)
        except KeyboardInterrupt:
            logger.warning("stopped after %d rows; what was measured is kept", len(bench.rows))
            return False
        return True

    whole = follow(bench.run())
    # All that has nothing to do with FP8 is finished first: an error of a GPU spoils what comes after it.
    result["check"] = bench.check
    result["product_operations_per_second"] = product_speed(place, dtype) if gpu else None
    result["goals"] = goals(result)
    if out is not None:
        write(result, out)
    if fp8 and whole:
        follow(bench.run_fp8())
    return result


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compares a result with the goals; only those that could be measured are in it, speed and memory on a GPU alone.

    Args:
        result: Of `run`.

    Returns:
        ``{"goal", "measured", "limit", "unit", "at_most", "met"}``.
    """
    on_gpu = result["device_type"] == "cuda"
    rows, found = [row for row in result["rows"] if row["tokens_per_second"] and on_gpu], []
    plain = [row["tokens_per_second"] for row in rows if row["step"] == "plain"]
    ours = [row for row in rows if row["step"] == "caching" and row["spec"] == result["spec"] and not row.get("fp8")]
    counts = sorted({row["layers"] for row in ours})
    for count in counts if plain else ():
        best = max(row["tokens_per_second"] for row in ours if row["layers"] == count and row["hessian"] != "eFIM")
        found.append(judged(f"caching {count} layers, times the plain model", best / max(plain), FASTER, "x", False))
    smallest = min((row["batch"] for row in ours), default=0)
    for hessian, limit in MEMORY.items():
        peaks = [row["peak_bytes"] for row in ours if (row["hessian"], row["batch"]) == (hessian, smallest)]
        if any(peaks):
            name = f"peak memory at batch {smallest}, {hessian}"
            found.append(judged(name, max(filter(None, peaks)) / 1e9, limit / 1e9, "GB", True))
    first = ours[0]["since_start_seconds"] if ours else None
    if first is not None:
        found.append(judged("first batch done, from the start of the process", first, FIRST_BATCH, "s", True))
    if result["check"].get("worst_cosine") is not None:
        name = f"worst cosine of {result['check']['rows']} written rows with an eager capture in float32"
        found.append(judged(name, result["check"]["worst_cosine"], COSINE, "", False))
    return found


def summary(result: Mapping[str, Any]) -> str:
    """The table as text, the arithmetic floor and the goals."""
    lines = [row_text(Row(**row)) for row in result["rows"]]
    speed, needed = result["product_operations_per_second"], result["model"]["operations_per_token"]
    if speed:
        lines.append(
            f"arithmetic floor: {speed / needed:,.0f} tokens/s at {speed / 1e12:.0f} TFLOP/s of a large product and "
            f"{needed / 1e9:.1f} GFLOP a token"
        )
    problems = [problem for row in result["rows"] for problem in row["stored"].get("problems", [])]
    lines.append(f"stores: {'; '.join(problems) if problems else 'all shards as written'}")
    if result["check"]:
        lines.append(f"check: {result['check']}")
    if result.get("fp8"):
        lines.append(f"with fp8 products: {result['fp8']}")
    lines += [goal_line(goal) for goal in result["goals"]]
    return "\n".join(lines)


def row_text(row: Row) -> str:
    """One line of the table."""
    name = f"{row.step} fp8" if row.fp8 else row.step
    start = f"{name:11} {row.spec:36} {row.layers or '':>4} {row.hessian:9} batch {row.batch:3}"
    if row.tokens_per_second is None:
        return f"{start}  {row.note}"
    memory = "" if row.peak_bytes is None else f"  {row.peak_bytes / 1e9:6.1f} GB"
    first = "" if row.first_batch_seconds is None else f"  first {row.first_batch_seconds:.1f} s"
    return f"{start}  {row.tokens_per_second:10,.0f} tokens/s{memory}{first}{row.note and f'  ({row.note})'}"


def parsed_spec(text: str) -> CompressionSpec:
    """A compression that can be measured.

    Args:
        text: ``sparsification->projection``.

    Raises:
        UsageError: It is flat in its first stage, or needs a file.
        SpecError: It cannot be parsed.
    """
    found = CompressionSpec.parse(text)
    if not (found.sparsification.is_identity or found.sparsification.is_factored) or found.needs_mask_file:
        raise UsageError(
            f"{found} cannot be measured here; expected a factored compression without files, as {FACTGRASS}"
        )
    return found


def _process_start() -> float | None:
    """When this process started, seconds since the epoch."""
    try:
        import psutil
    except ImportError:
        return None
    return float(psutil.Process().create_time())
