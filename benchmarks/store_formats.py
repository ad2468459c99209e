"""Bytes per sample and order of influence scores for every format of stored rows, beside float32 rows.

    python benchmarks/store_formats.py [--seeds 0 1 2] [--damping 0.1 0.001] [--out book/measured/store_formats.json]

The model is the embedded GPT-2 of gpt2_wikitext; its gradients on the blocks of its base model and those that it was
fine-tuned on are compressed and stored as float32, then as every other format: int8, fp8 and the plain types by
caching into them, low-rank stores from the float32 store. Each store is asked with the experiment's query blocks, and
for self-influence. A seed is that of the compression. ``seconds`` are those of the last pass for top-10 of all queries
over a store in the page cache; the preconditioning of the queries is in them.
"""

import argparse
import datetime
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from grass_lib.attribution import InfluenceFunction, compress
from grass_lib.baselines.crosscheck import spearman
from grass_lib.bench.store_compare import sample_bytes
from grass_lib.experiments import gpt2_wikitext
from grass_lib.gradients.language import causal_loss, causal_margin
from grass_lib.store import GradientStore

SPEC = {"sparsification": "random_mask-64*64", "projection": "sjlt-1024"}
PLAIN = ("bfloat16", "float16", "int8", "fp8")
RANKS = ((256, "bfloat16"), (64, "bfloat16"), (64, "int8"), (16, "bfloat16"))
BATCH, TOP = 32, 10


def influence(model: Any, store: Path, dtype: str, seed: int) -> InfluenceFunction:
    options: dict[str, Any] = {"target": causal_margin, "layers": gpt2_wikitext.LAYERS, "seed": seed, **SPEC}
    return InfluenceFunction(
        model, causal_loss, store=store, dtype=dtype, progress=False, fingerprint={"benchmark": "formats"}, **options
    )


def answers(found: InfluenceFunction, queries: list[dict[str, torch.Tensor]], dampings: list[float]) -> dict[str, Any]:
    found.topk(queries, TOP, dampings[0])
    return {
        "scores": [found.attribute(queries, damping) for damping in dampings],
        "own": [found.self_influence(damping) for damping in dampings],
        "seconds": found.timings["scoring"],
    }


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of the ten best samples of a query that are the same, mean over queries."""
    best = [scores.topk(TOP, dim=0).indices for scores in (one, other)]
    same = (best[0][:, None] == best[1][None]).any(dim=0).sum(dim=0)
    return float(same.double().mean()) / TOP


def line(
    store: GradientStore, exact: dict[str, Any], found: dict[str, Any], dampings: list[float], seed: int
) -> list[dict[str, Any]]:
    basis = store.basis
    facts = {
        "dtype": store.manifest.dtype_name,
        "rank": store.manifest.low_rank["rank"] if store.manifest.low_rank else None,
        "seed": seed,
        "bytes_per_sample": sample_bytes(store),
        "basis_bytes": len(basis.to_bytes()) if basis else 0,
        "kept": min(basis.kept.values()) if basis else None,
        "seconds": found["seconds"],
    }
    lines = []
    for place, damping in enumerate(dampings):
        scores, own = ((exact[name][place], found[name][place]) for name in ("scores", "own"))
        each = spearman(*scores)
        lines.append(
            {
                **facts,
                "damping": damping,
                "scores": float(each.mean()),
                "scores_lowest": float(each.min()),
                "self_influence": float(spearman(own[0][:, None], own[1][:, None])),
                "same_top10": overlap(*scores),
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--damping", type=float, nargs="+", default=[0.1, 0.001])
    parser.add_argument("--out", type=Path, default=Path("book/measured/store_formats.json"))
    options = parser.parse_args()
    protocol = gpt2_wikitext.protocol("embedded")
    data = gpt2_wikitext.load_data(protocol)
    networks = gpt2_wikitext.networks_folder("embedded")
    weights = gpt2_wikitext.attribution_checkpoint(protocol, data, networks, seed=0, device="cpu")
    model = gpt2_wikitext.make_model(protocol, weights, "cpu")
    train = gpt2_wikitext.batches(torch.cat([data.train_ids, data.base_ids]), BATCH)
    queries = gpt2_wikitext.batches(data.query_ids, BATCH)
    rows: list[dict[str, Any]] = []
    layers: dict[str, int] = {}
    for seed in options.seeds:
        folder = Path(tempfile.mkdtemp(prefix="store_formats"))
        try:
            whole = influence(model, folder / "float32", "float32", seed)
            whole.cache(train)
            layers = whole.sizes
            exact = answers(whole, queries, options.damping)
            rows += line(GradientStore.open(folder / "float32"), exact, exact, options.damping, seed)
            for dtype in PLAIN:
                found = influence(model, folder / dtype, dtype, seed)
                found.cache(train)
                store = GradientStore.open(folder / dtype)
                rows += line(store, exact, answers(found, queries, options.damping), options.damping, seed)
            for rank, dtype in RANKS:
                place = folder / f"rank{rank}-{dtype}"
                store = compress(folder / "float32", place, dtype=dtype, rank=rank, progress=False)
                found = influence(model, place, dtype, seed)
                rows += line(store, exact, answers(found, queries, options.damping), options.damping, seed)
            for row in rows:
                if row["seed"] == seed:
                    kind = f"rank {row['rank']} {row['dtype']}" if row["rank"] else row["dtype"]
                    print(
                        f"seed {seed} damping {row['damping']:<6g} {kind:18} {row['bytes_per_sample']:8,.0f} bytes  "
                        f"scores {row['scores']:.4f} (lowest {row['scores_lowest']:.4f})  self-influence "
                        f"{row['self_influence']:.4f}  same top 10 {row['same_top10']:.2f}  {row['seconds']:.2f} s",
                        flush=True,
                    )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    result = {
        "schema": 1,
        "command": "python benchmarks/store_formats.py",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": "cpu",
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": "gpt2_wikitext, embedded scale",
        "data": data.source,
        "data_sha256": data.sha256,
        "samples": sum(len(batch["input_ids"]) for batch in train),
        "queries": len(data.query_ids),
        "layers": layers,
        **SPEC,
        "seeds": options.seeds,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
