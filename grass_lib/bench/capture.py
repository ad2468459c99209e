"""What capturing adds to a pass: speed and memory of one caching step beside the passes alone, in one run."""

from __future__ import annotations

import datetime
import gc
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from grass_lib.bench.capture_goals import goals
from grass_lib.bench.capture_steps import (
    REPEATS,
    ROUNDS,
    Step,
    activations_step,
    by_turns,
    caching_step,
    measure,
    training_step,
)
from grass_lib.bench.results import goal_line, versions, write
from grass_lib.bench.throughput_run import FACTGRASS, LOGRA, parsed_spec
from grass_lib.errors import UsageError
from grass_lib.experiments.base import resolve_device
from grass_lib.specs import CompressionSpec

logger = logging.getLogger(__name__)

SCHEMA = 1
SHAPES: Mapping[str, tuple[dict[str, Any], int, int]] = {
    "gpt2": ({}, 16, 512),
    "tiny": ({"n_layer": 2, "n_embd": 256, "n_head": 4, "vocab_size": 256, "n_positions": 32}, 4, 32),
}
"""Settings of GPT-2, samples in a batch, tokens in a sample."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def run(
    shape: str = "gpt2",
    *,
    dtypes: Sequence[str] = tuple(DTYPES),
    specs: Sequence[str] = (FACTGRASS, LOGRA),
    batch: int = 0,
    compiled: bool = True,
    rounds: int = ROUNDS,
    repeats: int = REPEATS,
    device: str = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures everything; what was measured is written after every row.

    Args:
        shape: ``gpt2`` or ``tiny``, with random weights.
        dtypes: Of the weights.
        specs: Compressions; goals are judged at the first.
        batch: Samples in a batch; 0 for the shape's own.
        compiled: Compiles the passes and, on a GPU, records the steps.
        rounds: In which a step and the passes alone are measured by turns, at least 2.
        repeats: Timed calls of each step.
        device: ``auto``, ``cuda`` or ``cpu``.
        out: Where the JSON goes; None for nowhere.

    Raises:
        UsageError: An argument does not fit.
        SpecError: A compression cannot be parsed.
    """
    if shape not in SHAPES:
        raise UsageError(f"shape is {shape!r}; expected {' or '.join(SHAPES)}")
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown or not dtypes:
        raise UsageError(f"dtypes has {', '.join(map(repr, unknown)) or 'nothing'}; expected {' or '.join(DTYPES)}")
    if len(set(dtypes)) < len(dtypes):
        raise UsageError(f"dtypes has {', '.join(dtypes)}; expected each once")
    if rounds < 2 or repeats < 1:
        raise UsageError(f"rounds is {rounds} and repeats {repeats}; expected at least 2 and 1")
    if batch < 0:
        raise UsageError(f"batch is {batch}; expected a positive number of samples, or 0 for the shape's own")
    if not specs or not all(specs):
        raise UsageError("a compression is empty; expected one such as " + FACTGRASS)
    parsed = [parsed_spec(text) for text in specs]
    if len(set(map(str, parsed))) < len(parsed):
        raise UsageError(f"compressions are {', '.join(map(str, parsed))}; expected each once")
    settings, usual, tokens = SHAPES[shape]
    size, place = batch or usual, torch.device(resolve_device(device))
    if shape != "tiny" and place.type == "cpu":
        raise UsageError(f"shape {shape!r} takes hours on a CPU; expected tiny, or a GPU")
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "grass bench capture",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.machine(),
        "device_type": place.type,
        "versions": versions("transformers", "triton", "cuda-bindings"),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
        "shape": shape,
        "batch": size,
        "block": tokens,
        "compiled": compiled,
        "rows": [],
    }
    if place.type == "cuda":
        torch.set_float32_matmul_precision("highest")
    try:
        for name in dtypes:
            for row in _rows(settings, name, parsed, size, tokens, compiled, (rounds, repeats), place):
                result["rows"].append(row)
                logger.info("%s", row_text(row))
                if out is not None:
                    write(result, out)
    except KeyboardInterrupt:
        logger.warning("stopped after %d rows; what was measured is kept", len(result["rows"]))
    return result


def _rows(
    settings: Mapping[str, Any],
    name: str,
    specs: Sequence[CompressionSpec],
    size: int,
    tokens: int,
    compiled: bool,
    counts: tuple[int, int],
    device: torch.device,
) -> Any:
    """Row after row of one type of weights."""
    model = _model(settings, DTYPES[name], device)
    ids = torch.randint(0, model.config.vocab_size, (size, tokens), device=device)
    batch = {"input_ids": ids, "labels": ids}
    steps: list[tuple[str, CompressionSpec | None, AbstractContextManager[Step]]] = [
        ("activations", None, activations_step(model, compiled)),
        *(("caching", spec, caching_step(model, compiled, spec, size)) for spec in specs),
        ("training", None, training_step(model)),
    ]
    for kind, spec, entered in steps:
        torch._dynamo.reset()
        share: tuple[float, float] | tuple[None, None] = (None, None)
        with entered as step:
            seconds, peak = measure(step, batch, counts[1])
            if spec is not None:
                with activations_step(model, compiled) as base:
                    share = by_turns(base, step, batch, counts[0])
                del base
        del step
        _tidy(device)
        yield {
            "dtype": name,
            "step": kind,
            "spec": "" if spec is None else str(spec),
            "tokens_per_second": size * tokens / seconds,
            "peak_bytes": peak,
            "speed_share": share[0],
            "speed_share_half_width": share[1],
        }


def _model(settings: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0} if settings else {}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**settings, **ends, "use_cache": False}))
    return model.to(device=device, dtype=dtype).eval()


def _tidy(device: torch.device) -> None:
    """A step's memory is gone before the next one is measured."""
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()  # of streams that only this step used
        torch.cuda.empty_cache()


def row_text(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    memory = "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:6.2f} GB"
    share = ""
    if row["speed_share"] is not None:
        share = f"  {row['speed_share']:.4f} +- {row['speed_share_half_width']:.4f} of the passes alone"
    name = f"{row['dtype']:9} {row['step']:12} {row['spec']:36}"
    return f"{name} {row['tokens_per_second']:10,.0f} tokens/s{memory}{share}"


def summary(result: Mapping[str, Any]) -> str:
    """The table as text, and the goals."""
    lines = [row_text(row) for row in result["rows"]]
    lines += [goal_line(goal) for goal in goals(result)]
    return "\n".join(lines)
