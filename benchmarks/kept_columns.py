"""Ways to take kept columns of bfloat16 tensors on a GPU: alone, and inside a caching step of a Llama.

    python -m benchmarks.kept_columns --out kept_columns.json

Alone: microseconds for tensors of 8,192 rows, each read from memory (eight tensors in turn), by the kernel and by a
product with zeros and ones. In a step: tokens a second of FactGraSS (128 of both sides, sjlt-4096) on a Llama with the
layers of Llama-3.1-8B but fewer of them, beside the same compiled blocks without capture and LoGra (64 of both sides);
all in one run, the bare step first and last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.bench.throughput_steps import bare_step
from grass_lib.experiments.models.llama import SHAPES, llama_config, random_llama
from grass_lib.gradients import FactoredGradients
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.kernels.columns import WAYS, KeptColumns, kept_columns
from grass_lib.rng import Stream

ROWS = 8192
SIZES = (768, 1024, 2304, 3072, 4096, 14336)
DEFAULT = (KeptColumns.scatter_from, KeptColumns.product_to)


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Median of the device's time."""
    for _ in range(3):
        step()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def alone(d: int, k: int) -> dict[str, Any]:
    """Microseconds of one call."""
    index = Stream(0, "benchmark", "sparsification", 0).distinct(k, d, device=torch.device("cuda"))
    tensors = [torch.randn(ROWS, d, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    matrix = torch.zeros(d, k, device="cuda", dtype=torch.bfloat16)
    matrix[index, torch.arange(k, device="cuda")] = 1
    assert torch.equal(kept_columns(tensors[0], index, None), tensors[0] @ matrix)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "kernel": lambda x: kept_columns(x, index, None),
        "product": lambda x: x @ matrix,
        "read": lambda x: x.sum(),
    }
    row: dict[str, Any] = {"d": d, "k": k}
    for name, way in ways.items():
        graph = torch.cuda.CUDAGraph()
        way(tensors[0])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            kept = [way(x) for x in tensors]
        row[name] = milliseconds(graph.replay, 10) / len(tensors) * 1000
        del graph, kept
    return row


def steps(layers: int, batch: int, block: int, repeats: int) -> list[dict[str, Any]]:
    """Tokens a second in a Llama of few layers."""
    config = llama_config(SHAPES["llama-3.1-8b"])
    config.num_hidden_layers = layers
    model = random_llama(config, device=torch.device("cuda"), dtype=torch.bfloat16)
    ids = torch.randint(0, config.vocab_size, (batch, block), device="cuda")
    inputs = {"input_ids": ids, "labels": ids}

    factgrass = {"sparsification": "random_mask-128*128", "projection": "sjlt-4096"}
    cases: list[tuple[str, tuple[float, float], dict[str, str] | None]] = [("bare", DEFAULT, None)]
    cases += [("FactGraSS, default", DEFAULT, factgrass)]
    cases += [(f"FactGraSS, {name}", way, factgrass) for name, way in WAYS.items()]
    cases += [("LoGra", DEFAULT, {"sparsification": "normal-64*64", "projection": "identity"}), ("bare", DEFAULT, None)]
    rows = []
    for label, way, spec in cases:
        KeptColumns.scatter_from, KeptColumns.product_to = way
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        if spec is None:
            with bare_step(model) as step:
                spent = milliseconds(lambda step=step: step(inputs), repeats)
        else:
            factored = FactoredGradients(
                model, chunked_causal_loss, include_head=True, compile="blocks", timed=False, **spec
            )
            with factored.attached():
                spent = milliseconds(lambda factored=factored: factored(inputs), repeats)
            del factored
        rows.append({"step": label, "milliseconds": spent, "tokens_per_second": batch * block / spent * 1000})
        print(f"{label:20} {spent:8.2f} ms {rows[-1]['tokens_per_second']:10,.0f} tokens/s", flush=True)
    KeptColumns.scatter_from, KeptColumns.product_to = DEFAULT
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("kept_columns.json"))
    parser.add_argument("--layers", type=int, default=6, help="of the Llama; 0 leaves the steps out")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    facts: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": ROWS}
    facts["alone"] = [alone(d, 128) for d in SIZES]
    for row in facts["alone"]:
        print("  ".join(f"{name} {value:,.1f}" for name, value in row.items()), flush=True)
    if arguments.layers:
        facts["steps"] = steps(arguments.layers, arguments.batch, arguments.block, arguments.repeats)
    arguments.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
