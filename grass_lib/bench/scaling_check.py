"""Whether what several ranks made is what one rank makes: shards, rows and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from grass_lib.store import GradientStore
from grass_lib.store.shards import note_path


def compare_stores(found: Path, wanted: Path) -> dict[str, Any]:
    """Two stores, shard for shard.

    Args:
        found: Folder of one.
        wanted: Folder of the other.

    Returns:
        ``shards`` of the second, ``same_files`` (as many shards with the same rows), ``same_checksums`` (how many),
        ``worst_row`` (largest norm of a row's difference over the row's norm, over all layers together; exactly 0 where
        all checksums are the same) and ``problems`` of the first.

    Raises:
        StoreError: One of them is no store, or a shard is damaged or missing.
    """
    left, right = GradientStore.open(found), GradientStore.open(wanted)
    notes = [[_note(folder, number) for number in range(right.n_shards)] for folder in (found, wanted)]
    where = [[(note.get("first"), note.get("rows")) for note in side] for side in notes]
    same = [one.get("sha256") == other.get("sha256") for one, other in zip(*notes, strict=True)]
    comparable = left.layers == right.layers and left.n_shards == right.n_shards and where[0] == where[1]
    worst = None
    if comparable:
        worst = max((_worst_row(left, right, number) for number, equal in enumerate(same) if not equal), default=0.0)
    return {
        "shards": right.n_shards,
        "same_files": comparable,
        "same_checksums": sum(same),
        "worst_row": worst,
        "bytes": right.stored_bytes,
        "problems": [problem.message for problem in left.verify(progress=False)],
    }


def compare_scores(folder: Path, task: str, world: int, wanted: str) -> float:
    """Largest difference of any rank's scores from those of one rank, over the largest score.

    Args:
        folder: Where ranks left them.
        task: Of the several ranks.
        world: Their number.
        wanted: Task of the one rank.
    """
    (exact,) = (load_file(folder / f"scores-{wanted}-0-of-1.safetensors")["scores"],)
    errors = []
    for rank in range(world):
        scores = load_file(folder / f"scores-{task}-{rank}-of-{world}.safetensors")["scores"]
        errors.append(float((scores - exact).abs().max() / exact.abs().max()))
    return max(errors)


def _note(folder: Path, number: int) -> dict[str, Any]:
    path = note_path(folder, number)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _worst_row(left: GradientStore, right: GradientStore, number: int) -> float:
    one, other = left.read(number), right.read(number)
    count = len(next(iter(other.values())))
    difference, size = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for name, rows in other.items():
        difference += (one[name].double() - rows.double()).square().sum(dim=1)
        size += rows.double().square().sum(dim=1)
    return float((difference / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt().max())
