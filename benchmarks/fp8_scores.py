"""Influence scores with FP8 products beside float32 and bfloat16, on pretrained weights; writes JSON (10 minutes).

python benchmarks/fp8_scores.py [output.json]

The passages, prompts, layers and compression are those of the Llama experiment's embedded scale. A CPU computes the
roundings of FP8 as a GPU does, without its speed.
"""

import copy
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from grass_lib import InfluenceFunction
from grass_lib.evaluation.ranks import spearman
from grass_lib.experiments import llama3_openwebtext
from grass_lib.experiments.llama3_models import smollm2
from grass_lib.experiments.llama3_protocol import protocol
from grass_lib.experiments.llama3_queries import answers, load_prompts, query_batches
from grass_lib.experiments.llama3_results import Results
from grass_lib.gradients import chunked_causal_loss
from grass_lib.gradients.fp8 import block_linears
from grass_lib.report.fp8_scores import RESULT

TOP = 10
HESSIANS = ("eFIM", "Identity")
VARIANTS = {"FP8 products": True, "bfloat16 products": False}


def computed(model, fp8, given, queries, passages, store) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compressed gradients ``{layer: (n_train, k)}`` and scores ``{hessian: (n_train, n_query)}``."""
    scores = {}
    for hessian in HESSIANS:
        damping = {} if hessian == "Identity" else {"damping": given.damping}
        influence = InfluenceFunction(
            model,
            chunked_causal_loss,
            layers=given.layers(int(model.config.num_hidden_layers), True),
            include_head=True,
            sparsification=str(given.compression().sparsification),
            projection=str(given.compression().projection),
            hessian=hessian,
            store=store,
            fp8=fp8,
        )
        influence.cache(passages.batches(given.batch_size))
        scores[hessian] = influence.attribute(queries, **damping).double()
    rows = {name: [] for name in influence.sizes}
    for _, name, part in influence.store.stream():
        rows[name].append(part.double())
    return {name: torch.cat(parts) for name, parts in rows.items()}, scores


def rounded(value: Tensor) -> Tensor:
    """To bfloat16 and back; its gradient too."""
    return value.bfloat16().float()


def in_bfloat16(model):
    """A copy whose blocks' linear layers round weights, inputs, results and their gradients: what bfloat16 costs.

    The products themselves take a CPU ten times as long in bfloat16.
    """
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for name in block_linears(model):
        modules[name].weight.data = rounded(modules[name].weight.data)
        modules[name].register_forward_pre_hook(lambda module, args: rounded(args[0]))
        modules[name].register_forward_hook(lambda module, args, y: rounded(y))
    return model


def agreement(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """How alike two score matrices rank the passages, over prompts."""
    values = spearman(found, wanted)
    best = [scores.topk(TOP, dim=0).indices.T.tolist() for scores in (found, wanted)]
    shared = [len(set(one) & set(two)) / TOP for one, two in zip(*best, strict=True)]
    return {
        "mean_spearman": float(values.mean()),
        "worst_spearman": float(values.min()),
        "top_shared": sum(shared) / len(shared),
    }


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/bench/{RESULT}")
    torch.set_num_threads(1)
    given, chat = protocol("embedded"), smollm2()
    passages = llama3_openwebtext.load_passages(given, chat)
    prompts = load_prompts(given.n_prompts)
    with tempfile.TemporaryDirectory() as folder:
        replies = answers(chat, prompts, given.new_tokens, Results(Path(folder), {}))
    queries = query_batches(replies, chat.padding)
    start, found = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        rows, scores = computed(chat.model, False, given, queries, passages, folder)
    print(f"float32: {time.perf_counter() - start:.0f} s", flush=True)
    for name, fp8 in VARIANTS.items():
        model = chat.model if fp8 else in_bfloat16(chat.model)
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = computed(model, fp8, given, queries, passages, folder)
        cosines = {layer: torch.cosine_similarity(ours[layer], rows[layer], dim=1) for layer in rows}
        means = {layer: float(values.mean()) for layer, values in cosines.items()}
        worst = min(means, key=lambda layer: means[layer])
        found.append(
            {
                "name": name,
                "fp8": fp8,
                "scores": {hessian: agreement(theirs[hessian], scores[hessian]) for hessian in HESSIANS},
                "mean_cosine": sum(means.values()) / len(means),
                "worst_mean_cosine": means[worst],
                "worst_layer": worst,
                "mean_cosine_by_layer": means,
                "lowest_cosine_by_layer": {layer: float(values.min()) for layer, values in cosines.items()},
            }
        )
        print(name, found[-1]["scores"], found[-1]["mean_cosine"], worst, means[worst])
        print(f"{time.perf_counter() - start:.0f} s so far", flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "model": chat.name,
        "passages": len(passages),
        "tokens": given.length,
        "prompts": len(prompts),
        "layers": len(rows),
        "blocks": int(chat.model.config.num_hidden_layers),
        "last_blocks": given.last_blocks,
        "spec": str(given.compression()),
        "damping": given.damping,
        "variants": found,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
