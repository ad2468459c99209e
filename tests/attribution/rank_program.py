"""A program for torchrun: ``rank_program.py FOLDER SPARSIFICATION HESSIAN [KILLED_RANK|sharded]``.

Influence functions on a Llama of four layers with grouped-query attention, padding and an uneven last batch. Every rank
writes what it found to ``FOLDER/found-RANK-of-WORLD.safetensors``; a killed one kills itself in its third shard.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from grass_lib import InfluenceFunction
from grass_lib.gradients import causal_loss
from grass_lib.ranks import started_by_torchrun

N, QUERIES, LENGTH, BATCH, SHARD = 37, 5, 12, 3, 6


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def sharded(model, world):
    """Every layer's weights spread over the ranks."""
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def samples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (n, LENGTH), generator=generator)
    lengths = torch.randint(4, LENGTH + 1, (n,), generator=generator)
    mask = (torch.arange(LENGTH)[None] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def cut(batch, size):
    n = len(batch["input_ids"])
    return [{name: part[i : i + size] for name, part in batch.items()} for i in range(0, n, size)]


class Killed(list):
    """Batches of a rank that is killed when it comes to its third shard."""

    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            if place * BATCH >= 5 * SHARD:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def main():
    folder, sparsification, hessian = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    extra = sys.argv[4] if len(sys.argv) > 4 else ""
    with started_by_torchrun("cpu") as (ranks, _):
        model = sharded(make_model(), ranks.world) if extra == "sharded" else make_model()
        influence = InfluenceFunction(
            model,
            causal_loss,
            sparsification=sparsification,
            hessian=hessian,
            store=folder / "store",
            shard_size=SHARD,
            fingerprint={"data": "made up"},
            ranks=ranks,
            progress=False,
        )
        train, queries = cut(samples(N, 1), BATCH), cut(samples(QUERIES, 2), 2)
        if extra == str(ranks.rank):
            train = Killed(train)
        influence.cache(train, n_samples=N)  # counting them would end a killed rank
        top = influence.topk(queries, k=8)
        found = {
            "scores": influence.attribute(queries, 0.1 if hessian == "Identity" else [1e-2, 0.1]),
            "self": influence.self_influence(0.1),
            "indices": top.indices,
            "top": top.scores,
            "samples": torch.tensor(influence.timings["samples"]),
            "residuals": torch.tensor(list(influence.residuals.values()) or [0.0]),
        }
        found = {name: value.contiguous() for name, value in found.items()}
        save_file(found, str(folder / f"found-{ranks.rank}-of-{ranks.world}.safetensors"))


if __name__ == "__main__":
    main()
