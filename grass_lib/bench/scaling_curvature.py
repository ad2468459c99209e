"""The curvature as sums of squares over ranks, from a store's rows: time, bytes and memory, checked by other sums."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from grass_lib.attribution.curvature import Curvature, layer_rows, reduce_curvature
from grass_lib.attribution.preconditioner import primal_basis
from grass_lib.gradients.stream import clock
from grass_lib.precision import exact_products
from grass_lib.ranks import Ranks
from grass_lib.store import Store

CHECKED = 3
"""Layers of each rank whose sum is computed again from all rows."""


def sums(store: Store, layers: Sequence[str], ranks: Ranks, device: torch.device) -> Iterator[dict[str, Any]]:
    """Each rank sums over its shards, for every layer; then each layer's sums are added at the rank that it belongs to.

    Args:
        store: A complete store.
        layers: Names of all layers, in the same order on every rank.
        ranks: The processes.
        device: This rank's.

    Yields:
        What is known so far: ``bytes`` of a rank's sums, ``sum_seconds``, ``reduce_seconds``, ``peak_bytes`` of the
        device, the largest error over the largest entry (``error``) of the checked layers, and the seconds of one
        decomposition in float64 (``eigen_seconds``).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # The first message between devices opens connections, which is no part of what follows.
    ranks.add_at(0, torch.ones(1, device=device))
    ranks.meet("the start of the sums")
    start = clock(device)
    own = range(ranks.rank, store.n_shards, ranks.world)
    curvature = Curvature(store.layers, device)
    with exact_products():
        for _, name, rows in store.stream(shards=own):
            curvature.add(name, rows.to(device))
    found: dict[str, Any] = {
        "layers": len(layers),
        "bytes": sum(total.numel() * total.itemsize for total in curvature.sums.values()),
        "sum_seconds": clock(device) - start,
    }
    ranks.meet("the sums")
    start = clock(device)
    reduce_curvature(curvature, layers, ranks)
    found["reduce_seconds"] = clock(device) - start
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    yield found
    mine = [name for place, name in enumerate(layers) if ranks.owns(place)]
    errors = []
    for name in [mine[0], mine[len(mine) // 2], mine[-1]][:CHECKED]:
        rows = layer_rows(store, [name], device)[name].double()
        wanted = rows.mT @ rows
        errors.append(float((curvature.sums[name] - wanted).abs().max() / wanted.abs().max()))
    found["error"] = max(errors)
    yield found
    total = curvature.sums[mine[0]]
    start = clock(device)
    primal_basis(mine[0], total, store.n_samples, dtype=torch.float64, keep=torch.float32)
    found["eigen_seconds"] = clock(device) - start
    found["eigen_size"] = len(total)
    yield found
