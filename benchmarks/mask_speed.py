"""Seconds and memory of fitting masks: whole gradients of the MLP, and all layers of a GPT-2.

    python -m benchmarks.mask_speed --out mask_speed.json

Per-sample gradients of MNIST digits at a trained MLP (the 5,000 digits of the paper where ``GRASS_DATA`` has MNIST, the
embedded ones otherwise, repeated to 5,000 rows), one mask of every method. Then both sides of every linear layer of
GPT2-small's shape with random weights and random text: seconds of collecting, and of choosing by every method.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.experiments import mlp_mnist
from grass_lib.experiments.data.mnist import load_mnist
from grass_lib.gradients import PerSampleGradients, causal_loss, margin
from grass_lib.masks import METHODS, GradientSource, fit
from grass_lib.masks.factored import FACTORED_METHODS, choose, held_out_correlation
from grass_lib.masks.layer_samples import collect

ROWS = 5000
GOALS = {"cuda": {"flat": 30.0, "layers": 180.0}, "cpu": {"flat": 180.0}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--k", type=int, default=4096, help="of whole gradients")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--layers", type=int, default=12, help="blocks of the GPT-2; 0 leaves it out")
    parser.add_argument("--side", type=int, default=64, help="kept coordinates of each side of a layer")
    parser.add_argument("--passages", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    rows = flat(options.device, options.k, methods)
    if options.layers:
        rows += layers(options.device, options.layers, options.side, options.passages, methods)
    goals = GOALS[torch.device(options.device).type]
    for row in rows:
        goal = goals.get(row["part"])
        seconds = f"{row['seconds']:8.1f} s {row['processor_seconds']:8.1f} s of threads"
        text = f"{row['part']:<7} {row['what']:<10} {seconds} {row['bytes'] / 2**30:6.2f} GiB"
        correlation = row.get("correlation")
        text += f"  correlation {correlation:.3f}" if correlation is not None else ""
        print(text + (f"  (goal {goal:.0f} s)" if goal else ""))
    if options.out:
        device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
        options.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


class Stretch:
    """Seconds, seconds of all threads, and peak bytes above those at its start."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._held, self._start, self._cpu = self._bytes(), time.perf_counter(), time.process_time()

    def _bytes(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def end(self) -> dict[str, Any]:
        if self._cuda:
            torch.cuda.synchronize()
        seconds, processor = time.perf_counter() - self._start, time.process_time() - self._cpu
        return {"seconds": seconds, "processor_seconds": processor, "bytes": self._bytes() - self._held}


def trained(device: str, x: Tensor, y: Tensor) -> Any:
    """An MLP after two epochs: gradients of a network that has learned something."""
    torch.manual_seed(0)
    model = mlp_mnist.make_model().to(device).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for part in torch.randperm(len(x), device=device).split(64):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimiser.step()
    return model.eval()


def flat(device: str, k: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    try:
        data = load_mnist("paper")
    except Exception as error:  # noqa: BLE001 - whatever is missing, the embedded digits are there
        print(f"embedded digits, repeated to {ROWS} rows: {error}")
        data = load_mnist("embedded")
    copies = -(-ROWS // len(data.train_y))
    x, y = (value.repeat(copies, *[1] * (value.dim() - 1))[:ROWS].to(device) for value in (data.train_x, data.train_y))
    model = trained(device, x, y)
    source = GradientSource.from_model(PerSampleGradients(model, margin), mlp_mnist.batches(x, y))
    rows = []
    for method in methods:
        stretch = Stretch(device)
        mask = fit(source, k, method=method, progress=False)
        found = mask.provenance.get("held_out_correlation")
        rows.append(
            {
                "part": "flat",
                "what": method,
                **stretch.end(),
                "k": k,
                "rows": ROWS,
                "p": source.p,
                "correlation": None if found is None else float(found),
                "energy_correlation": float(mask.provenance.get("energy_correlation", "nan")),
            }
        )
        print(f"flat {method}: {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


def layers(device: str, blocks: int, side: int, passages: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=blocks, use_cache=False)).to(device).eval()
    ids = torch.randint(0, 50257, (passages, 512), generator=torch.Generator().manual_seed(0)).to(device)
    loader = [{"input_ids": part, "labels": part} for part in ids.split(8)]
    stretch = Stretch(device)
    found, n = collect(model, causal_loss, loader, rank=64, progress=False)
    rows = [{"part": "layers", "what": "collect", **stretch.end(), "layers": len(found), "passages": passages}]
    print(f"layers collect: {rows[-1]['seconds']:.1f} s", flush=True)
    for method in methods:
        if method not in FACTORED_METHODS:
            continue
        stretch = Stretch(device)
        masks = choose(found, n, (side, side), method=method, progress=False)
        row = {"part": "layers", "what": method, **stretch.end(), "side": side, "layers": len(found)}
        kept = {name: (masks[f"{name}/output"].indices, masks[f"{name}/input"].indices) for name in found}
        values = [held_out_correlation(layer, kept[name]) for name, layer in found.items()]
        rows.append({**row, "correlation": sum(values) / len(values)})
        print(f"layers {method}: {rows[-1]['seconds']:.1f} s", flush=True)
    return rows


if __name__ == "__main__":
    main()
