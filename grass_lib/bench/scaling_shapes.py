"""Sizes that `grass bench scaling` measures, and the plan that its processes are handed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from grass_lib.errors import UsageError
from grass_lib.experiments.models.llama import SHAPES, LlamaSizes

PARTS = ("caching", "curvature", "fsdp", "kill")
WORLDS = (1, 2)
"""Numbers of ranks that are compared."""
DAMPING = 0.1


@dataclass(frozen=True)
class Work:
    """A model and a training set of random tokens.

    Attributes:
        sizes: Of the model.
        spec: Compression of every linear layer.
        block: Tokens in a sequence.
        rows: Sequences.
        batch: Sequences in a step.
        shard: Rows of a shard, a multiple of the batch.
        queries: Sequences that are queries.
        dtype: Of the weights on a GPU, and of the stored rows everywhere.
    """

    sizes: LlamaSizes
    spec: str
    block: int
    rows: int
    batch: int
    shard: int
    queries: int
    dtype: str

    @property
    def warm_up(self) -> int:
        """Rows before the clocks start: a shard of every rank, for any number of ranks that is compared."""
        return max(WORLDS) * self.shard

    def changed(self, rows: int, batch: int) -> Work:
        """The same with other numbers; 0 leaves one as it is.

        Raises:
            UsageError: A number is negative, or ranks would not get the same work.
        """
        size = batch or self.batch
        if size < 1 or rows < 0:
            raise UsageError(f"rows is {rows} and batch {batch}; expected 0 (the shape's own) or more")
        found = replace(self, rows=rows or self.rows, batch=size, shard=max(self.shard // size, 1) * size)
        if found.rows % found.warm_up or found.rows <= found.warm_up:
            raise UsageError(
                f"rows is {found.rows}; expected a multiple of {found.warm_up} above it: the first {found.warm_up} "
                f"are a warm-up, and every rank has as many shards of {found.shard} rows"
            )
        return found


SMALL = LlamaSizes(
    layers=4, width=1024, feed_forward=2816, heads=8, kv_heads=4, vocabulary=32000, positions=1024, rope_scaling=False
)
SETTINGS: Mapping[str, tuple[Work, Work]] = MappingProxyType(
    {
        "llama": (
            Work(SHAPES["llama-3.1-8b"], "random_mask-128*128->sjlt-4096", 1024, 576, 8, 32, 8, "bfloat16"),
            Work(SMALL, "random_mask-32*32->sjlt-64", 256, 256, 4, 8, 8, "float32"),
        ),
        "tiny": (
            Work(SHAPES["tiny"], "random_mask-8*8->sjlt-32", 32, 24, 2, 4, 3, "bfloat16"),
            Work(SHAPES["tiny"], "random_mask-4*4->identity", 16, 48, 2, 4, 3, "float32"),
        ),
    }
)
"""By name: the work of the parts caching and curvature, and the smaller one of fsdp and kill.

The smaller one has more rows than features in a layer, so that its curvature is summed over ranks; the larger one
fewer, so that the rows' Gram matrix is decomposed.
"""


@dataclass(frozen=True)
class Plan:
    """What every process is told.

    Attributes:
        device: ``cuda`` or ``cpu``.
        main: Work of the parts caching and curvature.
        small: Work of the parts fsdp and kill.
        curvature: Whether the part curvature is wanted.
        folder: Where stores and results go.
        launched: When the process was started, seconds since the epoch.
    """

    device: str
    main: Work
    small: Work
    curvature: bool
    folder: Path
    launched: float = field(default=0.0)

    def write(self, path: Path) -> None:
        """Writes it for a process to read."""
        path.write_text(json.dumps({**asdict(self), "folder": str(self.folder)}), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads what `write` wrote."""
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in ("main", "small"):
            found[name] = Work(**{**found[name], "sizes": LlamaSizes(**found[name]["sizes"])})
        return cls(**{**found, "folder": Path(found["folder"])})


def facts(work: Work) -> dict[str, Any]:
    """A work's sizes as plain values."""
    return asdict(work)
