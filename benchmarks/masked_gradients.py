"""Time and memory of per-sample gradients at kept coordinates: ours beside vmap(grad) followed by the mask.

    python -m benchmarks.masked_gradients --out masked_gradients.json

A ResNet-9 with random weights, all ways on the same micro-batch in one run:

- ``plain``: forward and backward pass to the inputs with all weights frozen: the floor;
- ``vmap``: ``vmap(grad)`` of all weights, then the kept coordinates of each tensor, nothing else copied;
- ``torch`` and ``kernel``: ours, by PyTorch and, on a GPU, by the kernel.

On a GPU the paper's shape: 4,825,154 weights, 64 samples, 32,768 kept coordinates; on a CPU an eighth of the width and
the same share of coordinates. Products are exact float32 unless --tf32 is given. Memory is what is allocated above what
was there before the step; "excess" is that of a way above ``plain``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from grass_lib.gradients import MaskedGradients, PerSampleGradients, margin
from grass_lib.gradients.coordinates import split_coordinates
from grass_lib.rng import Stream

PAPER_WEIGHTS, PAPER_KEPT = 4_825_154, 32_768


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(torch.relu(self.norm2(self.conv2(y))) + self.norm3(self.shortcut(x)))


class ResNet9(nn.Module):
    """At width 64 the paper's shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        sizes = [width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(*(Block(sizes[i], sizes[i + 1], 1 + (i > 0)) for i in range(3)))
        self.head = nn.Linear(8 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.norm(self.stem(x)))).mean(dim=(2, 3)))


def plain_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    weights = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}

    def step() -> Tensor:
        x = batch[0].detach().requires_grad_()
        values = margin(lambda x: functional_call(model, weights, x), (x, batch[1]))
        return torch.autograd.grad(values.sum(), x)[0]

    return step


def vmap_step(model: nn.Module, batch: tuple[Tensor, Tensor], indices: Tensor) -> Callable[[], Tensor]:
    weights = {name: value.detach() for name, value in model.named_parameters()}
    buffers = {name: value.detach() for name, value in model.named_buffers()}
    parts = split_coordinates(indices.cpu(), {name: value.shape for name, value in weights.items()})
    places = {name: part.local.to(indices.device) for name, part in parts.items()}

    def value_of(used: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return margin(lambda x: functional_call(model, (used, buffers), x), (x[None], y[None]))[0]

    def step() -> Tensor:
        found = vmap(grad(value_of), in_dims=(None, 0, 0))(weights, *batch)
        return torch.cat([found[name].flatten(1).index_select(1, local) for name, local in places.items()], dim=1)

    return step


def seconds_of(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of the device's time on a GPU; on a CPU the least processor time, which other programs disturb less."""
    for _ in range(3 if device.type == "cuda" else 1):
        step()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            step()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.process_time()
            step()
            found.append(time.process_time() - start)
    return statistics.median(found) if device.type == "cuda" else min(found)


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at a time during a step, above what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    profiler: Any = found.profiler
    events = profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def measure(device: torch.device, width: int, n: int, share: float, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = ResNet9(width).to(device).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    batch = torch.randn(n, 3, 32, 32, device=device), torch.arange(n, device=device) % 2
    p = sum(parameter.numel() for parameter in model.parameters())
    kept = PAPER_KEPT if p == PAPER_WEIGHTS else max(1, round(share * p))
    indices = Stream(0, "benchmark", "sparsification", 0).distinct(kept, p, device=device)
    state = PerSampleGradients(model, margin).bind(None)
    steps = {"plain": plain_step(model, batch), "vmap": vmap_step(model, batch, indices)}
    for backend in ("torch", *(["kernel"] if device.type == "cuda" else [])):
        gradients = MaskedGradients(model, margin, indices, backend=backend)
        steps[backend] = lambda gradients=gradients: gradients(state, batch)[0]
    expected = steps["vmap"]()
    rows = {}
    for name, step in steps.items():
        found = step()
        error = None
        if name != "plain":
            error = float((found - expected).abs().max() / expected.abs().max())
        del found
        rows[name] = {"seconds": seconds_of(step, device, repeats), "peak_bytes": peak_of(step, device), "error": error}
    for row in rows.values():
        row["excess_bytes"] = row["peak_bytes"] - rows["plain"]["peak_bytes"]
    for row in rows.values():
        row["times_less_time_than_vmap"] = rows["vmap"]["seconds"] / row["seconds"]
        row["excess_share_of_vmap"] = row["excess_bytes"] / max(1, rows["vmap"]["excess_bytes"])
    return {"p": p, "kept": kept, "samples": n, "width": width, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, help="default: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--share", type=float, default=PAPER_KEPT / PAPER_WEIGHTS, help="of coordinates that are kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tf32", action="store_true", help="lets the GPU round factors to 10 bits")
    parser.add_argument("--out", type=Path, default=Path("masked_gradients.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    if device.type == "cpu":
        torch.set_num_threads(1)
    width = arguments.width or (64 if device.type == "cuda" else 8)
    found = measure(device, width, arguments.samples, arguments.share, arguments.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {"device": name, "torch": torch.__version__, "tf32": arguments.tf32, **found}
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{name}: {found['p']:,} weights, {found['kept']:,} kept, {found['samples']} samples")
    print(f"{'way':8} {'ms':>9} {'x less':>8} {'peak MB':>9} {'excess MB':>10} {'of vmap':>8} {'error':>9}")
    for way, row in found["rows"].items():
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        print(
            f"{way:8} {row['seconds'] * 1e3:9.2f} {row['times_less_time_than_vmap']:8.2f} "
            f"{row['peak_bytes'] / 1e6:9.1f} {row['excess_bytes'] / 1e6:10.1f} "
            f"{row['excess_share_of_vmap']:8.3f} {error:>9}"
        )


if __name__ == "__main__":
    main()
