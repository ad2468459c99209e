"""Which part of the FP8 products is wrong, if any: half a minute on a GPU, one line for each part.

python benchmarks/fp8_check.py

Products of single layers forward and backward, then the captured rows of a Llama of two blocks: eager, compiled, and
recorded as a CUDA graph. Products are compared with those in bfloat16, rows with an eager capture in float32; a layer's
cosine is the mean over its samples. The exit code is 1 where a cosine is below 0.9 or a part failed. Without a GPU the
sizes are small, the roundings those of the hardware, and nothing is recorded.
"""

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.gradients import FactoredGradients, chunked_causal_loss
from grass_lib.gradients.fp8 import fp8_products
from grass_lib.gradients.graph import RecordedStep

LOWEST = 0.9
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Tokens, inputs and outputs of a layer. The last has few tokens: cuBLAS has no kernels for some such shapes.
SHAPES = [(8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096), (37, 14336, 4096)]
SMALL = [(64, 64, 64), (64, 64, 32), (64, 64, 224), (64, 224, 64), (5, 224, 64)]
HIDDEN, BATCH, BLOCK = (1024, 4, 512) if GPU else (64, 4, 16)
VOCABULARY = 2048
SPEC = {"sparsification": f"random_mask-{HIDDEN // 16}*{HIDDEN // 16}", "projection": f"sjlt-{HIDDEN}"}

Line = tuple[float, str]
Pair = tuple[Tensor, Tensor]


def cosine(found: Tensor, wanted: Tensor) -> Tensor:
    """Of rows ``(n, k)``, however small; 0 where one of a pair is zero."""
    left, right = (nn.functional.normalize(part.double(), dim=1, eps=1e-300) for part in (found, wanted))
    return (left * right).sum(dim=1)


def recorded(run: Callable[[], Pair]) -> Pair:
    """What a function gives when it is replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for part in found:
        part.fill_(float("nan"))
    graph.replay()
    return found


def products(m: int, k: int, n: int) -> Iterator[tuple[str, Callable[[], Line]]]:
    """The products of one layer ``(k, n)`` with ``m`` tokens, in every way of running them."""
    torch.manual_seed(0)
    layer = nn.Linear(k, n, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    model = nn.Sequential(layer)
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    # Small and of all sizes, as the gradients of tokens are; the last token has none.
    size = torch.logspace(-9, -3, m, device=DEVICE)[:, None] * (torch.arange(m, device=DEVICE) < m - 1)[:, None]
    delta = (torch.randn(m, n, device=DEVICE) * size).bfloat16()

    def both(forward: Callable[[Tensor], Tensor]) -> Pair:
        y = forward(x)
        return y.detach(), torch.autograd.grad(y, x, delta)[0]

    def compared(found: Pair) -> Line:
        least, texts = 1.0, []
        for side, one, other in zip(("forward", "backward"), found, wanted, strict=True):
            error = float((one.double() - other.double()).norm() / other.double().norm())
            value = float(cosine(one[: m - 1], other[: m - 1]).min())
            value = value if one.isfinite().all() else float("nan")
            texts.append(f"{side} cosine {value:.4f}, relative error {error:.4f}")
            least = value if not value >= least else least
        return least, "; ".join(texts)

    def ran(way: str) -> Line:
        with fp8_products(model, ["0"], keep_weights=True):
            forward = model if way == "eager" else torch.compile(model, dynamic=False)
            both(forward)
            return compared(recorded(lambda: both(forward)) if way == "recorded" else both(forward))

    wanted = both(model)
    for way in ("eager", "compiled", *(["recorded"] if GPU else [])):
        yield f"product {m} x {k} -> {n}, {way}", lambda way=way: ran(way)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": HIDDEN * 7 // 2},
        **{"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "use_cache": False},
        **{"bos_token_id": None, "eos_token_id": None},
    )
    return LlamaForCausalLM(config).to(DEVICE, torch.bfloat16).eval()


def rows() -> Iterator[tuple[str, Callable[[], Line]]]:
    """The captured rows of a Llama, in every way of running it."""
    model = llama()
    ids = torch.randint(0, VOCABULARY, (BATCH, BLOCK), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch = {"input_ids": ids, "labels": ids}

    def gradients(model: Any, **options: Any) -> FactoredGradients:
        return FactoredGradients(model, chunked_causal_loss, include_head=True, timed=False, **SPEC, **options)

    wanted = gradients(copy.deepcopy(model).float())(batch)[0]

    def compared(found: dict[str, Tensor]) -> Line:
        values = {name: float(cosine(found[name], wanted[name]).mean()) for name in wanted}
        order = sorted(values, key=lambda name: (values[name] == values[name], values[name]))
        empty = sum(int((part == 0).all(dim=1).sum()) for part in found.values())
        low = [name for name in order if not values[name] >= LOWEST] or order[:1]
        median = values[order[len(order) // 2]]
        text = ", ".join(f"{values[name]:.4f} {name.removeprefix('model.layers.')}" for name in low)
        return values[order[0]], f"lowest {text}; median {median:.4f}; {empty} rows of {len(values) * BATCH} are zero"

    def ran(way: str, **options: Any) -> Line:
        step = gradients(model, compile=False if way == "eager" else "blocks", **options)
        with step.attached():
            if way != "recorded":
                step(batch)
                return compared(step(batch)[0])
            uses = step._pass.single_uses(chunked_causal_loss, batch, BATCH)
            return compared(RecordedStep(lambda given: step.deferred_step(given, BATCH, uses), batch)(batch)[0])

    yield "rows in bfloat16, eager", lambda: ran("eager")
    for way in ("eager", "compiled", *(["recorded"] if GPU else [])):
        yield f"rows with FP8 products, {way}", lambda way=way: ran(way, fp8=True)


def main() -> int:
    place = torch.cuda.get_device_name() if GPU else "CPU"
    print(f"{place}, PyTorch {torch.__version__}")
    wrong = 0
    parts = (part for shape in (SHAPES if GPU else SMALL) for part in products(*shape))
    for name, part in itertools.chain(parts, rows()):
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            value, text = part()
        except Exception as error:  # noqa: BLE001
            value, text = float("nan"), f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
        fine = value >= LOWEST
        wrong += not fine
        seconds = time.perf_counter() - start
        print(f"{'ok   ' if fine else 'WRONG'} {name} ({seconds:.1f} s): {text}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
