"""Where a compiled decoder layer's time goes, and what other ways to run it would give; a minute on a GPU.

    python -m benchmarks.decoder_step --layers 8 --batch 8 --out decoder_step.json

Decoder layers of Llama-3.1-8B's shape with random weights in bfloat16, forward and backward to their input, nothing
captured. One row for each way:

- ``plain``: transformers' layers as they are;
- ``compiled``: one compiled layer for all, as caching runs them;
- ``flash``: the same with PyTorch's own flash attention instead of cuDNN's;
- ``deterministic``: the same with strictly deterministic kernels, which leaves cuDNN's attention out;
- ``joined``: compiled, with one product for the query, key and value projections and one for gate and up;
- ``cublaslt``: compiled, with products by cuBLASLt;
- ``autotuned``: compiled, with products by whatever was fastest when it was compiled (takes minutes; not by default).

Nearly all of the arithmetic is in matrix products; the last columns say what they take and how fast they are. Products
that autotuning makes in Triton count as compiled code.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grass_lib.deterministic import deterministic_kernels
from grass_lib.experiments.models.llama import SHAPES, llama_config, random_llama

WAYS = ("plain", "compiled", "flash", "deterministic", "joined", "cublaslt", "autotuned")
KINDS = {
    "compiled code": ("triton",),
    "attention": ("flash", "fmha", "cudnn", "attention"),
    "products": ("nvjet", "gemm", "cutlass", "cublas", "xmma"),
}
"""Parts of kernels' names, looked for in this order: attention has products in its own."""


class _Joined:
    """Several linear layers of one input as one product; the first one of them is asked first."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.sizes = [layer.out_features for layer in layers]
        self.parts: tuple[Tensor, ...] = ()


class _Part(nn.Module):
    def __init__(self, joined: _Joined, place: int) -> None:
        super().__init__()
        self.joined, self.place = joined, place

    def forward(self, x: Tensor) -> Tensor:
        if self.place == 0:
            self.joined.parts = nn.functional.linear(x, self.joined.weight).split(self.joined.sizes, dim=-1)
        return self.joined.parts[self.place]


@contextmanager
def joined(blocks: nn.ModuleList) -> Iterator[None]:
    """Joins the projections of all blocks, and puts the layers back."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    for block in blocks:
        for parent, names in ((block.self_attn, ("q_proj", "k_proj", "v_proj")), (block.mlp, ("gate_proj", "up_proj"))):
            together = _Joined([getattr(parent, name) for name in names])
            for place, name in enumerate(names):
                before.append((parent, name, getattr(parent, name)))
                setattr(parent, name, _Part(together, place))
    try:
        yield
    finally:
        for parent, name, layer in before:
            setattr(parent, name, layer)


@contextmanager
def compiled(blocks: nn.ModuleList, **options: Any) -> Iterator[None]:
    """Runs every block compiled."""
    torch._dynamo.reset()
    for block in blocks:
        block._compiled_call_impl = torch.compile(block._call_impl, dynamic=False, **options)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@contextmanager
def cublaslt() -> Iterator[None]:
    """Products by cuBLASLt."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def parts_of(step: Callable[[], object], rows: int) -> tuple[dict[str, float], str]:
    """Milliseconds of a step's kernels by kind, and a table of the longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events:
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")
        sums[kind] += event.self_device_time_total / 1000
    lines = [f"  {event.self_device_time_total / 1000:8.3f} ms {event.count:5} {event.key[:140]}" for event in events]
    return sums, "\n".join(lines[:rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(SHAPES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0, help="Also print so many kernels of a step, by their time.")
    parser.add_argument("--ways", default=",".join(WAYS[:-1]))
    parser.add_argument("--out", type=Path, default=Path("decoder_step.json"))
    arguments = parser.parse_args()
    unknown = set(arguments.ways.split(",")) - set(WAYS)
    if unknown:
        parser.error(f"--ways has {', '.join(sorted(unknown))}; expected some of {', '.join(WAYS)}")
    device = torch.device("cuda")
    sizes = replace(SHAPES[arguments.shape], layers=arguments.layers, vocabulary=1024)
    model: Any = random_llama(llama_config(sizes), device=device, dtype=torch.bfloat16)
    body = model.eval().requires_grad_(False).model
    shape = arguments.batch, arguments.block, sizes.width
    entering = torch.randn(shape, device=device, dtype=torch.bfloat16)
    leaving = torch.randn(shape, device=device, dtype=torch.bfloat16)
    weights = sum(weight.numel() for weight in body.layers.parameters() if weight.dim() == 2)
    operations = 4.0 * weights * arguments.batch * arguments.block

    def step() -> Tensor:
        x = entering.detach().requires_grad_()
        return torch.autograd.grad(body(inputs_embeds=x).last_hidden_state, x, leaving)[0]

    rows: list[dict[str, Any]] = []
    exact = None
    for way in arguments.ways.split(","):
        options = {"options": {"max_autotune_gemm": True}} if way == "autotuned" else {}
        with (
            joined(body.layers) if way == "joined" else cublaslt() if way == "cublaslt" else nullcontext(),
            sdpa_kernel(SDPBackend.FLASH_ATTENTION) if way == "flash" else nullcontext(),
            deterministic_kernels(device) if way == "deterministic" else nullcontext(),
            compiled(body.layers, **options) if way != "plain" else nullcontext(),
        ):
            for _ in range(3):
                found = step()
            exact = found if exact is None else exact
            seconds = []
            for _ in range(arguments.repeats):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                step()
                end.record()
                end.synchronize()
                seconds.append(begin.elapsed_time(end))
            parts, table = parts_of(step, arguments.profile)
        taken = statistics.median(seconds)
        rows.append(
            {
                "way": way,
                "milliseconds": taken,
                "parts": parts,
                "operations_per_second": operations / parts["products"] * 1000 if parts["products"] else None,
                "difference": float((found.float() - exact.float()).norm() / exact.float().norm()),
            }
        )
        shown = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
        speed = (rows[-1]["operations_per_second"] or 0.0) / 1e12
        print(
            f"{way:14} {taken:8.2f} ms  {shown}  products at {speed:.0f} TFLOP/s  differs {rows[-1]['difference']:.1e}",
            flush=True,
        )
        if table:
            print(table, flush=True)
        facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(arguments), "rows": rows}
        arguments.out.write_text(json.dumps(facts, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
