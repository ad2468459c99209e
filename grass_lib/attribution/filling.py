"""Fills a gradient store by a walk over the training set: what is missing of it, on this rank of several."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch

from grass_lib.attribution.caching import ShardCache
from grass_lib.attribution.curvature import Curvature, reduce_curvature
from grass_lib.attribution.origin import DATA_NOTES, KeptStore
from grass_lib.attribution.preconditioner import LayerBasis, primal_layers
from grass_lib.attribution.scoring import clocked
from grass_lib.deterministic import deterministic_kernels, is_deterministic
from grass_lib.errors import UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.order import check_order, sample_sha256, spread_sha256
from grass_lib.gradients.outputs import Batch
from grass_lib.gradients.stream import progress_bar, sample_count
from grass_lib.ranks import Ranks, is_sharded
from grass_lib.store import Store


class StoreFiller:
    """Walks over the training set and writes the shards that are missing.

    Attributes:
        curvature: Sums of all rows, where the last walk computed all of them and they were wanted; whoever takes them
            sets None.
        bases: For whoever decomposes the curvature: kept here because a walk makes them void, and frees them first.
    """

    def __init__(
        self,
        gradients: FactoredGradients,
        kept: KeptStore,
        timings: dict[str, float],
        *,
        sums: torch.dtype | None,
        deterministic: bool,
        ranks: Ranks,
        progress: bool,
    ) -> None:
        """Remembers what to do; nothing is read or written.

        Args:
            gradients: Of the loss.
            kept: Where the store is.
            timings: Seconds of the walk go there, and ``samples``.
            sums: Type of the curvature's sums; None where they are not wanted.
            deterministic: Asks for deterministic kernels.
            ranks: Processes that share the work.
            progress: Shows a bar.
        """
        self._gradients, self._kept, self._timings = gradients, kept, timings
        self._sums, self._deterministic, self._ranks, self._progress = sums, deterministic, ranks, progress
        self._strict: bool | None = None
        self.curvature: Curvature | None = None
        self.bases: dict[str, LayerBasis] | None = None

    def __call__(self, loader: Iterable[Batch], n_samples: int | None, worker: int, n_workers: int) -> None:
        """One walk, where something is missing.

        Args:
            loader: Yields batches of one size in a fixed order.
            n_samples: Number of training samples, where the loader does not say it.
            worker: Number of this worker.
            n_workers: Number of workers.

        Raises:
            UsageError: The loader shuffles, its length is not known, or batches do not fit the shards.
            GrassError: A gradient is not finite.
            StoreError: The folder holds a store of something else, or cannot be written.
        """
        check_order(loader, shared=not self._ranks.alone)
        if not self._ranks.alone:
            if (worker, n_workers) != (0, 1):
                raise UsageError(
                    f"worker {worker} of {n_workers} is for processes that know nothing of each other, and here are "
                    f"{self._ranks.world} ranks; leave it out"
                )
            worker, n_workers = self._ranks.rank, self._ranks.world
        with self._ranks.together("caching"):
            expected, batches = sample_count(loader) if n_samples is None else n_samples, iter(loader)
            first = next(batches, None)
            if first is None:
                raise UsageError("the loader yielded no batches; expected training data")
            size = batch_size(batch_to(first, self._gradients.device))
            if not size:
                raise UsageError("the loader's first batch has no samples; expected batches of one size, 1 or more")
            start = time.perf_counter()
            data = dict(zip(DATA_NOTES, (sample_sha256(first), spread_sha256(loader)), strict=True))
            store = self._kept.make(expected, size, data)
            opening = time.perf_counter() - start
            missing = store.missing(worker, n_workers)
        self._timings.update(dict.fromkeys(self._timings, 0.0), opening=opening)
        todo = self._ranks.tell(len(missing))
        if not any(todo):
            return
        # Rows that are there already would have to be read now; once at the end is enough, and gives the same bits (but
        # for the order of sums over several ranks).
        self.curvature = self.bases = curvature = None
        if self._sums is not None and sum(todo) == store.n_shards:
            curvature = Curvature(primal_layers(store), self._gradients.device, self._sums)
        cache = ShardCache(self._gradients, store, curvature)
        # All ranks take part in every pass of a model whose weights are sharded: those with fewer have idle ones.
        passes = cache.passes(size, worker, n_workers) if is_sharded(self._gradients.model) else 0
        idle = max(self._ranks.tell(passes)) - passes
        with self._ranks.together("caching"):
            if missing or idle:
                self._settle(first)
                self._walk(cache, store, chain([first], batches), worker=worker, n_workers=n_workers, idle_passes=idle)
        if curvature is not None:
            with clocked(self._timings, "curvature", self._gradients.device):
                reduce_curvature(curvature, list(store.layers), self._ranks)
        self.curvature = curvature

    def warm_up(self, batch: Batch) -> None:
        """Compiles and records the step for batches of this shape; nothing is kept."""
        with self._ranks.together("warming up"):
            self._settle(batch)
            with self._kernels():
                self._gradients(batch)

    def _settle(self, batch: Batch) -> None:
        """Finds out, once and by a pass whose results nobody needs, how strictly kernels can be deterministic."""
        device = self._gradients.device
        self._gradients.compiled_size = batch_size(batch_to(batch, device))
        if self._deterministic and self._strict is None and device.type == "cuda":
            self._strict = is_deterministic(device, lambda: self._gradients(batch))

    def _kernels(self) -> AbstractContextManager[None]:
        if not self._deterministic:
            return nullcontext()
        return deterministic_kernels(self._gradients.device, strict=bool(self._strict))

    def _walk(self, cache: ShardCache, store: Store, batches: Iterable[Batch], **work: int) -> None:
        """Computes a worker's missing shards, and keeps the time."""
        self._gradients.restart_clocks()
        with self._kernels(), progress_bar(store.n_samples, "gradients", self._progress) as bar:
            cache.run(batches, bar, **work)
        self._timings.update(cache.seconds | self._gradients.timings)
        self._timings["samples"] = float(cache.samples)
