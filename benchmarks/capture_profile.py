"""Where the time and the memory of one caching step go: kernels by their sums, blocks that live at the peak.

    python -m benchmarks.capture_profile --dtype bfloat16 --kernels 40 --blocks 15

GPT2-small's shape with random weights, beside the passes alone; `grass bench capture` compares their speed.
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path

import torch

from benchmarks.live_blocks import blocks_of
from grass_lib.bench.capture import DTYPES
from grass_lib.bench.capture_steps import WARM, Batch, Step, activations_step, caching_step
from grass_lib.bench.throughput_run import FACTGRASS
from grass_lib.specs import CompressionSpec


def kernels(step: Step, batch: Batch, rows: int) -> str:
    """Kernels of one step with their sums and counts, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    for _ in range(WARM):
        step(batch)
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
    from transformers import GPT2Config, GPT2LMHeadModel

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--spec", default=FACTGRASS)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--kernels", type=int, default=0, help="Print so many kernels of a step, by their time.")
    parser.add_argument("--blocks", type=int, default=0, help="Print so many groups of blocks at the peak.")
    parser.add_argument("--events", type=Path, help="Folder where --blocks also writes every allocation as JSON.")
    arguments = parser.parse_args()
    if arguments.events is not None:
        if not arguments.blocks:
            parser.error("--events needs --blocks")
        arguments.events.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=arguments.layers, use_cache=False)
    model = GPT2LMHeadModel(config).to(device="cuda", dtype=DTYPES[arguments.dtype]).eval()
    ids = torch.randint(0, config.vocab_size, (arguments.batch, arguments.block), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    compiled, spec = not arguments.no_compile, CompressionSpec.parse(arguments.spec)
    for name, entered in (
        ("activations", activations_step(model, compiled)),
        ("caching", caching_step(model, compiled, spec, arguments.batch)),
    ):
        torch._dynamo.reset()
        print(name, flush=True)
        with entered as step:
            if arguments.blocks:  # the first call, since a recorded step allocates nothing later
                written = None if arguments.events is None else arguments.events / f"{arguments.dtype}-{name}.json"
                print(blocks_of(partial(step, batch), arguments.blocks, written), flush=True)
            if arguments.kernels:
                print(kernels(step, batch, arguments.kernels), flush=True)
        del step
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # of streams that only this step used
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
