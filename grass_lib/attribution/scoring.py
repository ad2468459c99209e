"""Query gradients in bounded portions, and passes over a store that multiply its rows with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.attribution.caching import check_finite
from grass_lib.attribution.curvature import slices
from grass_lib.attribution.preconditioner import LayerBasis, warn_unresolved
from grass_lib.errors import UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.head import takes_head
from grass_lib.gradients.order import check_order
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.gradients.stream import clock, progress_bar, sample_count
from grass_lib.precision import exact_products
from grass_lib.ranks import Ranks
from grass_lib.store import Store
from grass_lib.store.formats import Rows

CPU_QUERY_BYTES = 2**30
CUDA_QUERY_BYTES = 4 * 2**30


def queries_at_once(store: Store, n_damping: int, dtype: torch.dtype, device: torch.device) -> int:
    """Queries whose gradients, preconditioned ones and scores of a shard fit 4 GiB (1 GiB on a CPU); at least one.

    Args:
        store: Whose rows they meet.
        n_damping: Preconditioned gradients per query.
        dtype: Of all of them.
        device: Where they are.
    """
    per_query = sum(store.features.values()) * (n_damping + 1) + store.shard_size * n_damping
    budget = CUDA_QUERY_BYTES if device.type == "cuda" else CPU_QUERY_BYTES
    return max(1, budget // (per_query * dtype.itemsize))


class Scorer:
    """Multiplies the rows of a store with query gradients, a bounded portion of queries at a time.

    Query gradients are never rounded to the store's dtype.
    """

    def __init__(
        self,
        gradients: FactoredGradients,
        target: Output | None,
        dtype: torch.dtype,
        timings: dict[str, float],
        progress: bool,
        ranks: Ranks,
    ) -> None:
        """Keeps the arguments.

        Args:
            gradients: The training set's.
            target: Higher is better; None for minus the loss.
            dtype: Of query gradients, products and scores.
            timings: Entries ``query_gradients`` and ``scoring`` start anew with each call that scores.
            progress: Whether bars are shown.
            ranks: Share the work: every rank has its shards, and its layers.
        """
        self._gradients, self._dtype, self._timings, self._progress = gradients, dtype, timings, progress
        self._ranks = ranks
        self.device = gradients.device
        # The loss too is handed over as another output, so that no query meets the compiled pass of the training set.
        self._output = gradients.loss if target is None else _minus(target)

    def blocks(
        self, store: Store, bases: Mapping[str, LayerBasis] | None, loader: Iterable[Batch], grid: Sequence[float]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Preconditioned gradients of queries.

        Args:
            store: Whose rows they will meet.
            bases: Of this rank's layers; None for no preconditioning.
            loader: Yields query batches, of any sizes.
            grid: Damping values.

        Yields:
            The number of queries in a portion, and ``{layer: (len(grid) * queries, k_l)}``.

        Raises:
            UsageError: The loader is empty or shuffles.
            GrassError: A gradient is not finite.
        """
        check_order(loader, every_sample=False, shared=not self._ranks.alone)
        self._start(bases, grid)
        rows = queries_at_once(store, len(grid), self._dtype, self.device)
        with progress_bar(sample_count(loader), "queries", self._progress) as bar:
            portions = self._portions(loader, rows, bar)
            while True:
                with clocked(self._timings, "query_gradients", self.device):
                    queries = next(portions, None)
                if queries is None:
                    return
                count = len(next(iter(queries.values())))
                with clocked(self._timings, "scoring", self.device), exact_products():
                    if store.basis is not None:
                        queries = {name: store.basis.reduce(name, part) for name, part in queries.items()}
                    # Layer after layer: its gradients go when the preconditioned ones come.
                    for place, name in enumerate(queries if bases is not None else ()):
                        queries[name] = self._preconditioned(place, name, queries[name], bases or {}, grid)
                yield count, queries

    def _preconditioned(
        self, place: int, name: str, queries: Tensor, bases: Mapping[str, LayerBasis], grid: Sequence[float]
    ) -> Tensor:
        """``(len(grid) * m, k)``, computed by the rank that the layer belongs to."""
        owner = self._ranks.owner(place)
        if self._ranks.rank == owner:
            found = bases[name].precondition(queries, grid).flatten(0, 1)
        else:
            found = queries.new_empty(len(grid) * len(queries), queries.shape[1])
        return self._ranks.send(owner, found)

    def shards(self, store: Store, prepared: Mapping[str, Tensor]) -> Iterator[tuple[range, Tensor]]:
        """Sums over layers of the inner products of this rank's rows with prepared queries, in one pass over a store.

        Args:
            store: A complete store.
            prepared: ``{layer: (columns, k_l)}``.

        Yields:
            Sample indices of a shard, and ``(samples, columns)``.

        Raises:
            StoreError: A shard is missing, damaged or cannot be read.
        """
        own = range(self._ranks.rank, store.n_shards, self._ranks.world)
        found = score_shards(store, prepared, self.device, own)
        with progress_bar(sum(len(store.shard_rows(number)) for number in own), "scores", self._progress) as bar:
            while True:
                with clocked(self._timings, "scoring", self.device), exact_products():
                    item = next(found, None)
                if item is None:
                    return
                yield item
                bar.update(len(item[0]))

    def self_influence(self, store: Store, bases: Mapping[str, LayerBasis] | None, grid: Sequence[float]) -> Tensor:
        """Every row with itself.

        Args:
            store: A complete store.
            bases: Of this rank's layers; None for no preconditioning.
            grid: Damping values.

        Returns:
            ``(len(grid), n_samples)``; each rank adds up its layers, and the sum is over all.

        Raises:
            StoreError: A shard is missing, damaged or cannot be read.
        """
        self._start(bases, grid)
        result = torch.zeros(len(grid), store.n_samples, dtype=self._dtype, device=self.device)
        with (
            self._ranks.together("scoring"),
            clocked(self._timings, "scoring", self.device),
            exact_products(),
        ):
            layers = [name for place, name in enumerate(store.layers) if self._ranks.owns(place)]
            for samples, name, rows in store.stream_rows(layers=layers) if layers else ():
                for part, values in device_rows(rows, self._dtype, self.device):
                    place = result[:, samples.start + part.start : samples.start + part.stop]
                    place += values.square().sum(dim=1) if bases is None else bases[name].self_influence(values, grid)
        return self._ranks.add(result)

    def _start(self, bases: Mapping[str, LayerBasis] | None, grid: Sequence[float]) -> None:
        warn_unresolved(list((bases or {}).values()), grid)
        self._timings["query_gradients"] = self._timings["scoring"] = 0.0

    def _portions(self, loader: Iterable[Batch], rows: int, bar: tqdm) -> Iterator[dict[str, Tensor]]:
        """Query gradients ``{layer: (m, k_l)}``, ``m`` at most ``rows``, however the loader cuts them."""
        held: dict[str, list[Tensor]] = {name: [] for name in self._gradients.sizes}
        count = seen = 0
        for batch in loader:
            samples = batch_to(batch, self.device)
            size, first = batch_size(samples), 0
            found, _ = self._gradients(samples, output=self._output)
            check_finite(found, seen, "query")
            while first < size:
                last = min(size, first + rows - count)
                for name, parts in held.items():
                    parts.append(found[name][first:last])
                count, first = count + last - first, last
                if count == rows:
                    yield _joined(held, self._dtype)
                    count = 0
            seen += size
            bar.update(size)
        if not seen:
            raise UsageError("the loader yielded no queries; expected at least one")
        if count:
            yield _joined(held, self._dtype)


def score_shards(
    store: Store, prepared: Mapping[str, Tensor], device: torch.device, shards: Iterable[int] | None = None
) -> Iterator[tuple[range, Tensor]]:
    """Sums over layers of the inner products of all rows with prepared queries, in one pass over a store.

    Args:
        store: A complete store.
        prepared: ``{layer: (columns, k_l)}`` on the device, in the dtype of the products.
        device: Where to compute.
        shards: Numbers of the shards wanted; None for all.

    Yields:
        Sample indices of a shard, and ``(samples, columns)``.

    Raises:
        StoreError: A shard is missing, damaged or cannot be read.
    """
    columns = next(iter(prepared.values()))
    for samples, items in groupby(store.stream_rows(shards=shards), key=lambda item: item[0]):
        scores = torch.zeros(len(samples), len(columns), dtype=columns.dtype, device=device)
        for _, name, rows in items:
            for part, values in device_rows(rows, columns.dtype, device):
                scores[part].addmm_(values, prepared[name].mT)
        yield samples, scores


def device_rows(rows: Rows, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Rows on the device in another dtype, portion by portion."""
    for part in slices(len(rows), rows.shape[1] * dtype.itemsize):
        # Decoded there, not here: fewer bytes travel.
        yield part, rows.part(part).to(device).decoded().to(dtype)


@contextmanager
def clocked(timings: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Adds the seconds of a block, the device's work included, to an entry of ``timings``."""
    start = clock(device)
    yield
    timings[name] += clock(device) - start


def _minus(target: Any) -> Output:
    if takes_head(target):
        return lambda model, batch, *, head=None: -target(model, batch, head=head)
    return lambda model, batch: -target(model, batch)


def _joined(held: dict[str, list[Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    result = {name: torch.cat(parts).to(dtype) for name, parts in held.items()}
    for parts in held.values():
        parts.clear()
    return result
