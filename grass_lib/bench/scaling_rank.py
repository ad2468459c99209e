"""One rank of `grass bench scaling`: ``torchrun -m grass_lib.bench.scaling_rank PLAN.json TASK``."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from grass_lib.attribution.influence import InfluenceFunction
from grass_lib.bench.scaling_curvature import sums
from grass_lib.bench.scaling_launch import keep, result_path
from grass_lib.bench.scaling_shapes import DAMPING, Plan, Work
from grass_lib.deterministic import deterministic_kernels
from grass_lib.experiments.models.llama import llama_config, random_llama
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.gradients.language import causal_loss
from grass_lib.gradients.outputs import Batch
from grass_lib.gradients.stream import clock
from grass_lib.ranks import Ranks, started_by_torchrun
from grass_lib.specs import CompressionSpec

TASKS = ("main", "small", "fsdp", "kill")
"""The shape of interest; the smaller one; that with its weights over all ranks; that with a rank that is killed."""
VICTIM = 1
"""The rank that is killed."""


class Batches:
    """Batches of random tokens in a fixed order.

    Attributes:
        started: When the clock started, seconds of `time.perf_counter`; 0 before.
        warm: The same, seconds since the epoch.
        killed_at: Before which sequence the process kills itself; None for never.
        note: Where it writes when, seconds since the epoch.
    """

    def __init__(
        self, work: Work, n: int, seed: int, size: int, *, ranks: Ranks | None = None, device: torch.device
    ) -> None:
        """Draws the tokens.

        Args:
            work: Sizes.
            n: Sequences.
            seed: Of the tokens.
            size: Sequences in a batch.
            ranks: Start their clocks together after the warm-up; None for no clock.
            device: Has finished its work by then.
        """
        generator = torch.Generator().manual_seed(seed)
        self._ids = torch.randint(0, work.sizes.vocabulary, (n, work.block), generator=generator)
        self._size, self._warm_up, self._ranks, self._device = size, work.warm_up, ranks, device
        self.started = self.warm = 0.0
        self.killed_at: int | None = None
        self.note = Path()

    def __len__(self) -> int:
        return -(-len(self._ids) // self._size)

    def __iter__(self) -> Iterator[Batch]:
        for number, ids in enumerate(self._ids.split(self._size)):
            position = number * self._size
            if self._ranks is not None and position == self._warm_up:
                clock(self._device)
                self._ranks.meet("the warm-up")
                self.started, self.warm = time.perf_counter(), time.time()
            if position == self.killed_at:
                self.note.write_text(str(time.time()), encoding="utf-8")
                os.kill(os.getpid(), signal.SIGKILL)
            yield {"input_ids": ids, "labels": ids}


class Rank:
    """Does one task as one of the ranks."""

    def __init__(self, plan: Plan, task: str, ranks: Ranks, device: torch.device) -> None:
        """Remembers the arguments; the model is not there yet."""
        self._plan, self._task, self._ranks, self._device = plan, task, ranks, device
        self._work = plan.main if task == "main" else plan.small
        self._write = keep(result_path(plan.folder, task, ranks.world, ranks.rank))
        gpu = device.type == "cuda"
        self._facts: dict[str, Any] = {
            "rank": ranks.rank,
            "world": ranks.world,
            "device": torch.cuda.get_device_name(device) if gpu else device.type,
            "backend": dist.get_backend() if dist.is_initialized() else "",
            "torch": torch.__version__,
            "start_seconds": time.time() - plan.launched,
        }

    def run(self) -> None:
        """Builds the model, caches and scores; what is known is written after every step."""
        start = clock(self._device)
        model = self._model()
        self._note(build_seconds=clock(self._device) - start, **self._weights(model))
        big = self._task == "main"
        influence = InfluenceFunction(
            model,
            # A sharded output layer cannot be taken in portions; the smaller shape does without.
            chunked_causal_loss if big else causal_loss,
            include_head=big,
            sparsification=str(CompressionSpec.parse(self._work.spec).sparsification),
            projection=str(CompressionSpec.parse(self._work.spec).projection),
            store=self._plan.folder / f"store-{self._task}-{self._ranks.world}",
            dtype=getattr(torch, self._work.dtype),
            shard_size=self._work.shard,
            compile="blocks" if big and self._device.type == "cuda" else False,
            fingerprint={"data": "random tokens"},
            ranks=self._ranks,
            progress=False,
        )
        self._cache(influence)
        if not big or self._plan.curvature:
            self._score(influence)
        if big and self._plan.curvature:
            names, store = list(influence.sizes), influence.store
            del influence, model
            for found in sums(store, names, self._ranks, self._device):
                self._note(sums=found)

    def _note(self, **values: Any) -> None:
        self._facts |= values
        self._write(self._facts)

    def _model(self) -> Any:
        # On a CPU half precision is slow, and nothing is measured there.
        dtype = getattr(torch, self._work.dtype) if self._device.type == "cuda" else torch.float32
        model = random_llama(llama_config(self._work.sizes), device=self._device, dtype=dtype)
        if self._task != "fsdp" or self._ranks.alone:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._device.type, (self._ranks.world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def _weights(self, model: Any) -> dict[str, int]:
        """Bytes of the model, and of what this rank holds of it."""
        whole = sum(weight.numel() * weight.itemsize for weight in model.parameters())
        own: list[Tensor] = [getattr(weight, "_local_tensor", weight) for weight in model.parameters()]
        return {"weight_bytes": whole, "own_weight_bytes": sum(part.numel() * part.itemsize for part in own)}

    def _cache(self, influence: InfluenceFunction) -> None:
        work, ranks = self._work, self._ranks
        timed = None if self._task == "kill" else ranks
        batches = Batches(work, work.rows, 1, work.batch, ranks=timed, device=self._device)
        if self._task == "kill":
            mark = self._plan.folder / "killed-at.txt"
            # The second start finds the note, and is left alone.
            batches.note, batches.killed_at = mark, None
            if ranks.rank == VICTIM and not mark.exists():
                batches.killed_at = work.rows // work.shard // 2 * work.shard
        self._reset_peak()
        start = clock(self._device)
        influence.cache(batches, n_samples=work.rows)
        end = clock(self._device)
        found: dict[str, Any] = {
            "seconds": end - start,
            "peak_bytes": self._peak(),
            "samples": int(influence.timings["samples"]),
            "layers": len(influence.sizes),
            "k": influence.k,
        }
        if batches.started:
            found |= {
                "steady_seconds": end - batches.started,
                "steady_rows": work.rows - work.warm_up,
                "warm_seconds": batches.warm - self._plan.launched,
            }
        self._note(caching=found)

    def _score(self, influence: InfluenceFunction) -> None:
        """Scores of some queries, kept in a file beside the store; kernels that give the same bits every time."""
        self._empty()
        self._reset_peak()
        # Queries do not run through compiled blocks and need more memory each.
        size = max(1, self._work.batch // 4)
        queries = Batches(self._work, self._work.queries, 2, size, device=self._device)
        start = clock(self._device)
        with deterministic_kernels(self._device):
            scores = influence.attribute(queries, DAMPING)
        seconds = clock(self._device) - start
        found = {name: influence.timings[name] for name in ("curvature", "query_gradients", "scoring")}
        name = f"scores-{self._task}-{self._ranks.rank}-of-{self._ranks.world}.safetensors"
        save_file({"scores": scores.cpu().contiguous()}, str(self._plan.folder / name))
        self._note(scores={"seconds": seconds, "parts": found, "peak_bytes": self._peak(), "shape": list(scores.shape)})

    def _empty(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None


def main(arguments: Iterable[str]) -> None:
    """Runs a task."""
    path, task = arguments
    plan = Plan.read(Path(path))
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("highest")
    with contextlib.ExitStack() as stack:
        ranks, place = stack.enter_context(started_by_torchrun(plan.device))
        Rank(plan, task, ranks, torch.device(place)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
