"""Measures random words and projections, and prints them as ratios to one pass over the input; writes JSON.

    python benchmarks/projection_speed.py [--device cuda] [--batch 512] [--p 109386] [--json speed.json] SPEC ...

A ratio of 1 means that a projection takes as long as reading and writing its input once (a copy).
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from grass_lib.projection import build_projector
from grass_lib.rng import Stream

EMBEDDED = [
    "random_mask-1024",
    "sjlt-256",
    "sjlt-1024",
    "sjlt_4-1024",
    "fjlt-256",
    "fjlt-512",
    "fjlt-1024",
    "grass-1024",
]
EMBEDDED += ["rademacher-256", "normal-256"]
PAPER = [f"{family}-{k}" for k in (2048, 8192) for family in ("random_mask", "sjlt", "fjlt", "grass")]
PAPER += ["rademacher-8192", "normal-8192"]


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Best of some repeats after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--p", type=int, default=109_386)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    batch = options.batch or (5000 if on_gpu else 512)
    x = torch.randn(batch, options.p, device=device)
    copy = seconds(x.clone, device)
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.processor()} x {options.threads} threads"
    result = {"device": name, "torch": torch.__version__, "shape": [batch, options.p], "copy_seconds": copy}
    n = 1 << (24 if on_gpu else 20)
    counters, stream = torch.arange(n, device=device), Stream(0)
    result["ns_per_word"] = seconds(lambda: stream.words(counters), device) / n / 4 * 1e9
    result["ns_per_normal"] = seconds(lambda: stream.normal(n, device=device), device) / n * 1e9
    result["ns_per_kept"] = seconds(lambda: stream.keep_mask(n, 0.1, device=device), device) / n * 1e9
    print(json.dumps(result, indent=1))
    rows = []
    for spec in options.specs or (PAPER if on_gpu else EMBEDDED):
        build = seconds(lambda s=spec: build_projector(s, options.p, device=device, backend=options.backend), device, 1)
        projector = build_projector(spec, options.p, device=device, backend=options.backend)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        taken = seconds(lambda p=projector: p(x), device)
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        rows.append({"spec": spec, "build": build, "seconds": taken, "ratio_to_copy": taken / copy, "peak_bytes": peak})
        memory = f", scratch {peak / 2**20:.0f} MiB" if peak is not None else ""
        print(
            f"{spec:18} {taken * 1e3:9.2f} ms = {taken / copy:6.1f} copies (build {build * 1e3:.1f} ms{memory})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({**result, "projections": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
