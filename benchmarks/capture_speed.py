"""Tokens per second and memory of one caching step, beside the same frozen model without capture and plain training.

    python -m benchmarks.capture_speed --out capture_speed.json

GPT2-small's shape with random weights. Four kinds of step on the same batches, in one run:

- ``activations``: forward and backward pass to the embeddings' output, all weights frozen, nothing captured;
- ``caching``: our step: compressed per-sample gradients of the 48 layers, stage 2 included;
- ``training``: transformers' model with all weight gradients (the floor of systems that form them), not compiled, and
  compiled.

The loss is the same function in all of them. Memory is that of each step alone. A device that gets warm runs slower:
the speed of our step beside ``activations`` is measured once more with both by turns, in rounds of a few steps each.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.live_blocks import blocks_of
from grass_lib.gradients import FactoredGradients, causal_loss
from grass_lib.gradients.graph import RecordedStep

BLOCK, ROUNDS = 512, 40
_T = 2.023  # of Student's distribution with ROUNDS - 1 degrees, for 95 % intervals
SPECS = {
    "FactGraSS": {"sparsification": "random_mask-128*128", "projection": "sjlt-4096"},
    "LoGra": {"sparsification": "normal-64*64", "projection": "identity"},
}


def make_model(dtype: torch.dtype, layers: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, use_cache=False)
    return GPT2LMHeadModel(config).to(device="cuda", dtype=dtype).eval()


def make_batch(size: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 50257, (size, BLOCK), device="cuda")
    return {"input_ids": ids, "labels": ids}


@contextmanager
def activations_step(model: Any, compiled: bool, graph: bool) -> Iterator[Callable[..., None]]:
    model.requires_grad_(False)

    def values(embedded: Tensor, labels: Tensor) -> Tensor:
        return causal_loss(model, {"inputs_embeds": embedded, "labels": labels})

    run = torch.compile(values, dynamic=False) if compiled else values

    def plain(batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        embedded = model.transformer.wte(batch["input_ids"]).detach().requires_grad_()
        found = run(embedded, batch["labels"])
        gradient = torch.autograd.grad(found.sum(), embedded)[0]
        # Results of a recorded step are kept: one number of the gradient stands for it.
        return {"embedded": gradient[:, 0, :1]}, found.detach()

    recorded: list[RecordedStep] = []

    def step(batch: dict[str, Tensor]) -> None:
        if not graph:
            plain(batch)
            return
        if not recorded:
            recorded.append(RecordedStep(plain, batch))
        recorded[0](batch)

    yield step


@contextmanager
def training_step(model: Any, compiled: bool) -> Iterator[Callable[..., None]]:
    model.requires_grad_(True)
    run = torch.compile(causal_loss, dynamic=False) if compiled else causal_loss

    def step(batch: dict[str, Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        run(model, batch).sum().backward()

    yield step


@contextmanager
def caching_step(
    model: Any, compiled: bool, graph: bool, size: int, spec: dict[str, str], out: torch.dtype
) -> Iterator[Callable[..., None]]:
    factored = FactoredGradients(model, causal_loss, compile=compiled, graph=graph, timed=False, **spec)
    rows = torch.empty(size, factored.k, dtype=out, device="cuda")

    parts = rows.split(list(factored.sizes.values()), dim=1)

    def step(batch: dict[str, Tensor]) -> None:
        gradients, _ = factored(batch)
        torch._foreach_copy_(parts, list(gradients.values()))  # as they are written, one layer after the other

    with factored.attached():
        yield step


def seconds_of(step: Callable[..., None], batch: dict[str, Tensor]) -> float:
    """Of one step, by the device's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step(batch)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def by_turns(base: Callable[..., None], step: Callable[..., None], batch: dict[str, Tensor]) -> tuple[float, float]:
    """Speed of a step as a share of another one's: mean over the rounds and half of its 95 % interval."""
    for warm in (base, base, base, step):
        warm(batch)
    ratios = []
    for place in range(ROUNDS):
        taken = {}
        for which in (base, step) if place % 2 == 0 else (step, base):
            taken[which] = statistics.median(seconds_of(which, batch) for _ in range(5))
        ratios.append(taken[base] / taken[step])
    return statistics.mean(ratios), _T * statistics.stdev(ratios) / ROUNDS**0.5


def measure(step: Callable[..., None], batch: dict[str, Tensor], repeats: int) -> tuple[float, int]:
    """Median seconds of a step, and the bytes that it needs: allocated at most, recordings with all they hold."""
    for _ in range(3):
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = [seconds_of(step, batch) for _ in range(repeats)]
    # A replayed graph allocates nothing: its memory is a pool of its own, which it keeps.
    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    held = sum(part["total_size"] - part["allocated_size"] for part in pools)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() + held


def profile(step: Callable[..., None], batch: dict[str, Tensor], rows: int) -> str:
    """Kernels of one step with their sums and counts, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    with profiling(activities=[ProfilerActivity.CUDA]) as found:
        step(batch)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    lines = [f"  {total / 1000:.2f} ms in {sum(event.count for event in events)} kernels"]
    lines += [
        f"  {event.self_device_time_total / 1000:7.3f} ms {event.count:5} {event.key[:100]}" for event in events[:rows]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("capture_speed.json"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument(
        "--how",
        default="compiled+graph,compiled,plain+graph,plain",
        help="Ways to run a step: compiled, graph (recorded as a CUDA graph), both, or plain.",
    )
    parser.add_argument("--specs", default=",".join(SPECS), help="Which presets.")
    parser.add_argument("--no-compiled-training", action="store_true")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--profile", type=int, default=0, help="Also print so many kernels of a step, by their time.")
    parser.add_argument("--blocks", type=int, default=0, help="Also print so many groups of blocks at the peak.")
    parser.add_argument("--events", type=Path, help="Folder where --blocks also writes every allocation as JSON.")
    arguments = parser.parse_args()
    if arguments.events is not None:
        if not arguments.blocks:
            parser.error("--events needs --blocks")
        arguments.events.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "batch": arguments.batch,
        "block": BLOCK,
    }
    rows: list[dict[str, Any]] = []
    for name in arguments.dtypes.split(","):
        dtype = getattr(torch, name)
        model, batch = make_model(dtype, arguments.layers), make_batch(arguments.batch)
        variants = [tuple(word in how for word in ("compiled", "graph")) for how in arguments.how.split(",")]
        steps: list[tuple[str, bool, bool, Callable[[], AbstractContextManager[Callable[..., None]]]]] = []
        for compiled, graph in variants:
            steps.append(("activations", compiled, graph, partial(activations_step, model, compiled, graph)))
            for label, spec in ((label, SPECS[label]) for label in arguments.specs.split(",")):
                build = partial(caching_step, model, compiled, graph, arguments.batch, spec, torch.bfloat16)
                steps.append((label, compiled, graph, build))
        steps += [
            ("training", compiled, False, partial(training_step, model, compiled))
            for compiled in (
                () if arguments.no_training else (False,) if arguments.no_compiled_training else (False, True)
            )
        ]
        for label, compiled, graph, build in steps:
            torch._dynamo.reset()
            with build() as step:
                if arguments.blocks:  # the first call, since a recorded step allocates nothing later
                    file = f"{name}-{label}{'-compiled' * compiled}{'-graph' * graph}.json"
                    written = None if arguments.events is None else arguments.events / file
                    print(f"{name} {label}\n{blocks_of(partial(step, batch), arguments.blocks, written)}", flush=True)
                seconds, peak = measure(step, batch, arguments.repeats)
                shares = None
                if label in SPECS:
                    with activations_step(model, compiled, graph) as base:
                        shares = by_turns(base, step, batch)
                    del base
                if arguments.profile:
                    print(profile(step, batch, arguments.profile), flush=True)
            del step
            model.requires_grad_(False)
            model.zero_grad(set_to_none=True)
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()  # of streams that only this step used
            torch.cuda.empty_cache()
            rows.append(
                {
                    "dtype": name,
                    "step": label,
                    "compiled": compiled,
                    "graph": graph,
                    "tokens_per_second": arguments.batch * BLOCK / seconds,
                    "peak_bytes": peak,
                    "by_turns": shares,
                }
            )
            # After every row: a run that is cut off keeps what it measured.
            arguments.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
            first = next(
                row for row in rows if (row["dtype"], row["step"], row["compiled"]) == (name, "activations", True)
            )
            speed = rows[-1]["tokens_per_second"]
            how = f"{'compiled' if compiled else 'plain'}{'+graph' if graph else ''}"
            print(
                f"{name:9} {label:12} {how:15} {speed:10,.0f} tokens/s {speed / first['tokens_per_second']:.3f}  "
                f"{peak / 1e9:6.2f} GB {peak / first['peak_bytes']:.3f}"
                + (f"  by turns {shares[0]:.4f} +- {shares[1]:.4f}" if shares else ""),
                flush=True,
            )
        del model


if __name__ == "__main__":
    main()
