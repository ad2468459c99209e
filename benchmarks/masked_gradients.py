"""Time and memory of per-sample gradients at kept coordinates: ours beside vmap(grad) followed by the mask.

    python -m benchmarks.masked_gradients --out masked_gradients.json

A ResNet-9 with random weights, all ways on the same micro-batch in one run:

- ``plain``: forward and backward pass to the inputs with all weights frozen: the floor;
- ``vmap``: ``vmap(grad)`` of all weights, then the kept coordinates of each tensor, nothing else copied;
- ``torch`` and ``kernel``: ours, by PyTorch and, on a GPU, by the kernel;
- on a GPU, each with ``+graph``: the same, recorded as a CUDA graph and replayed. What cannot be recorded is named.

On a GPU the paper's shape: 4,825,154 weights, 64 samples, 32,768 kept coordinates; on a CPU an eighth of the width and
the same share of coordinates. Products are exact float32 unless --tf32 is given. Every call of ours with ``+graph``
copies the checkpoint and the batch in, and the rows out; all of ours check the rows for finiteness.

Memory is measured over the second and the third call; with ``+graph`` the second runs as it is and records, the third
replays. ``peak_bytes`` is the most that was allocated above what was there before, while recording too.
``reserved_bytes`` is the most that PyTorch took from the GPU above what it held before with an empty cache, gaps and
the graph's memory included. ``held_bytes`` is what it still holds afterwards with an empty cache: with ``+graph`` the
graph's memory between calls. "Excess" is the peak, or what was reserved, above that of ``plain``.

--profile N prints the N longest kernels of one replay of ``kernel+graph``.
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

from grass_lib.errors import GrassError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, margin
from grass_lib.gradients.capturing import CapturedGraphs
from grass_lib.gradients.coordinates import split_coordinates
from grass_lib.gradients.state import ModelState
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


class Ours:
    """A call of `MaskedGradients`; ``refused`` says whether it was to be recorded and could not be."""

    def __init__(
        self, gradients: MaskedGradients, state: ModelState, batch: tuple[Tensor, Tensor], graph: bool
    ) -> None:
        self._gradients, self._state, self._batch, self._graph = gradients, state, batch, graph

    def __call__(self) -> Tensor:
        return self._gradients(self._state, self._batch)[0]

    @property
    def refused(self) -> bool:
        return self._graph and not self._gradients.recorded


class Recorded:
    """Another step that runs as it is once, is then recorded, and replayed from then on."""

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        self._step, self._graphs = step, CapturedGraphs(device)
        self._out: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> Tensor:
        if self._out is None:
            self._out = self._step()
            return self._out
        if self._replay is None:
            out, step = self._out, self._step
            self._replay = self._graphs(lambda: out.copy_(step()))
        self._replay()
        return self._out


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


def memory_of(step: Callable[[], object], device: torch.device) -> dict[str, int | None]:
    """Memory over two calls, bytes; see the top."""
    if device.type == "cpu":
        return {"peak_bytes": peak_on_cpu(step), "reserved_bytes": None, "held_bytes": None}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    peaks = torch.cuda.max_memory_allocated() - allocated, torch.cuda.max_memory_reserved() - reserved
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - reserved
    return {"peak_bytes": peaks[0], "reserved_bytes": peaks[1], "held_bytes": held}


def peak_on_cpu(step: Callable[[], object]) -> int:
    """Most bytes allocated at a time during a step, above what was there before."""
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


def print_kernels(step: Callable[[], object], most: int) -> None:
    """The longest kernels of the fourth call."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    times = [
        (event.self_device_time_total, event.count, event.key)
        for event in found.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total, count = sum(time for time, _, _ in times), sum(count for _, count, _ in times)
    print(f"one replay: {count} kernels and copies, {total / 1e3:.3f} ms on the GPU")
    for time_us, count, name in sorted(times, reverse=True)[:most]:
        print(f"{time_us / 1e3:9.3f} ms {count:5}  {name[:100]}")


def measure(device: torch.device, width: int, n: int, share: float, repeats: int, profile: int = 0) -> dict[str, Any]:
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
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "plain": lambda: plain_step(model, batch),
        "vmap": lambda: vmap_step(model, batch, indices),
    }

    def ours(backend: Any, graph: bool) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Ours:
            gradients = MaskedGradients(model, margin, indices, backend=backend, graph=graph)
            return Ours(gradients, state, batch, graph)

        return make

    makers["torch"] = ours("torch", False)
    if device.type == "cuda":
        makers["kernel"] = ours("kernel", False)
        makers["plain+graph"] = lambda: Recorded(plain_step(model, batch), device)
        makers["vmap+graph"] = lambda: Recorded(vmap_step(model, batch, indices), device)
        makers["torch+graph"], makers["kernel+graph"] = ours("torch", True), ours("kernel", True)
    expected = makers["vmap"]()()
    scale = float(expected.abs().max())
    rows: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        step = make()
        try:
            step()
            row: dict[str, Any] = dict(memory_of(step, device))
            found = step()
        except (GrassError, RuntimeError) as error:
            if not name.endswith("+graph"):
                raise
            failed[name] = str(error)
            continue
        if isinstance(step, Ours) and step.refused:
            failed[name] = "the warning above says why"
            continue
        row["error"] = None if name.startswith("plain") else float((found - expected).abs().max()) / scale
        del found
        row["seconds"] = seconds_of(step, device, repeats)
        rows[name] = row
        del step
    for row in rows.values():
        row["times_less_time_than_vmap"] = rows["vmap"]["seconds"] / row["seconds"]
        for kind, label in (("peak", "excess"), ("reserved", "reserved_excess")):
            if row[f"{kind}_bytes"] is None:
                continue
            row[f"{label}_bytes"] = row[f"{kind}_bytes"] - rows["plain"][f"{kind}_bytes"]
            whole = rows["vmap"][f"{kind}_bytes"] - rows["plain"][f"{kind}_bytes"]
            row[f"{label}_share_of_vmap"] = row[f"{label}_bytes"] / max(1, whole)
    if profile:
        print_kernels(makers["kernel+graph"](), profile)
    return {"p": p, "kept": kept, "samples": n, "width": width, "rows": rows, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, help="default: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--share", type=float, default=PAPER_KEPT / PAPER_WEIGHTS, help="of coordinates that are kept")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tf32", action="store_true", help="lets the GPU round factors to 10 bits")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="longest kernels of a replay to print")
    parser.add_argument("--out", type=Path, default=Path("masked_gradients.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.profile and device.type != "cuda":
        parser.error("--profile needs --device cuda")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = arguments.tf32
    if device.type == "cpu":
        torch.set_num_threads(1)
    width = arguments.width or (64 if device.type == "cuda" else 8)
    found = measure(device, width, arguments.samples, arguments.share, arguments.repeats, arguments.profile)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {"device": name, "torch": torch.__version__, "tf32": arguments.tf32, **found}
    arguments.out.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
    print(f"{name}: {found['p']:,} weights, {found['kept']:,} kept, {found['samples']} samples")
    titles = ("ms", "x less", "peak MB", "reserved", "held", "excess", "of vmap", "reserved", "of vmap", "error")
    print(f"{'way':12}" + "".join(f"{title:>10}" for title in titles))
    for way, row in found["rows"].items():
        cells = [f"{row['seconds'] * 1e3:.2f}", f"{row['times_less_time_than_vmap']:.2f}"]
        for name in ("peak", "reserved", "held"):
            cells.append(megabytes(row[f"{name}_bytes"]))
        for name in ("excess", "reserved_excess"):
            share = row.get(f"{name}_share_of_vmap")
            cells += [megabytes(row.get(f"{name}_bytes")), "" if share is None else f"{share:.3f}"]
        cells.append("" if row["error"] is None else f"{row['error']:.1e}")
        print(f"{way:12}" + "".join(f"{cell:>10}" for cell in cells))
    for way, reason in found["failed"].items():
        print(f"{way}: not recorded: {reason}")


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


if __name__ == "__main__":
    main()
