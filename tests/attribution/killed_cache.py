"""A program: ``killed_cache.py FOLDER [KILL]`` caches real gradients of a tiny text model into 24 shards."""

import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "store")]

import store_tools  # noqa: E402
import zoo  # noqa: E402

from grass_lib import InfluenceFunction  # noqa: E402

N, BATCH, SHARD = 93, 2, 4


def loss(model, batch):
    (ids,) = batch
    following = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = functional.cross_entropy(model(ids).flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(ids.shape).sum(dim=1)


def influence(folder):
    return InfluenceFunction(
        zoo.make_model("text"),
        loss,
        sparsification="random_mask-4*4",
        projection="sjlt-8",
        store=folder,
        dtype=torch.bfloat16,
        shard_size=SHARD,
        fingerprint={"data": "text zoo"},
        progress=False,
    )


def batches():
    (ids,) = zoo.make_samples("text", N)
    return [(part,) for part in ids.split(BATCH)]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        kind, count = sys.argv[2].split("=")
        store_tools._kill_at(kind, int(count))
    made = influence(sys.argv[1])
    made.cache(batches())
    print("samples", int(made.timings["samples"]))
