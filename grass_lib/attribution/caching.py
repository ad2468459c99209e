"""One walk over the training set that fills a gradient store: compute, round, copy and write at the same time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.attribution.curvature import Curvature, RowBlock
from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.meter import Meter, measured
from grass_lib.gradients.outputs import Batch
from grass_lib.gradients.passes import Compile
from grass_lib.precision import exact_products
from grass_lib.report.environment import memory_bytes
from grass_lib.store import ShardWriter, Store
from grass_lib.store.formats import Rows, empty_rows, encode, row_bytes
from grass_lib.words import few

_PINNED_BYTES = 2**30
_SHOWN = 8
_SHARD_SIZE = 1024
_SHARD_BYTES = 2**28  # two of them fit pinned memory, and all but the last are written while the next is computed


class ShardCache:
    """Computes the missing shards of one worker.

    Rows are rounded to the store's dtype, or encoded, in a block on the device, added to the curvature as they will be
    read, and copied to one of two shards' worth of memory on the host, which the store's thread writes while the next
    shard is computed.

    Attributes:
        samples: How many were computed.
        drain: Seconds that the end of the walk waited for the last shards to be written.
    """

    def __init__(self, gradients: FactoredGradients, store: Store, curvature: Curvature | None = None) -> None:
        """Allocates the memory.

        Args:
            gradients: Of the loss.
            store: To be filled.
            curvature: Is added to; None where it is not wanted.
        """
        self._gradients, self._store, self._curvature = gradients, store, curvature
        device = gradients.device
        self._block = RowBlock(store.layers, store.shard_size, store.row_dtype, device)
        self._hosts = [_host_shard(store, device) for _ in range(min(2, store.n_shards))]
        self._sums: list[Tensor] = []
        self._copied = self._submitted = 0
        self._meter = Meter(device)
        self._transfer = Meter(device)
        self._waited = self.drain = 0.0
        self.samples = 0

    @property
    def seconds(self) -> dict[str, float]:
        """``writing``, for which the walk waited, and ``curvature``; waits for the device."""
        return {"writing": self._waited, "curvature": self._meter.seconds}

    @property
    def transfer_seconds(self) -> float:
        """Of copies to the host's memory, on the device's clock; waits for the device."""
        return self._transfer.seconds

    def passes(self, batch: int, worker: int, n_workers: int) -> int:
        """How many batches of a size a worker has to compute."""
        missing = self._store.missing(worker, n_workers)
        return sum(-(-len(self._store.shard_rows(number)) // batch) for number in missing)

    def run(
        self, loader: Iterable[Batch], bar: tqdm, *, worker: int = 0, n_workers: int = 1, idle_passes: int = 0
    ) -> None:
        """Walks the loader once and computes what is missing.

        Args:
            loader: Yields batches in a fixed order; none may reach over the end of a shard.
            bar: Is advanced by the samples.
            worker: This worker's number.
            n_workers: Number of workers.
            idle_passes: Passes at the end whose results nobody wants, where the model's weights are sharded and other
                ranks have so many more to do.

        Raises:
            UsageError: Batches do not fit the shards, or there are fewer or more samples than the store has.
            GrassError: A gradient is not finite; nothing of its shard is written.
            StoreError: A shard could not be written.
        """
        todo, seen = set(self._store.missing(worker, n_workers)), 0
        filler: Batch | None = None
        with self._gradients.attached(), self._store.writer(worker=worker, n_workers=n_workers) as writer:
            for batch in loader:
                samples = batch_to(batch, self._gradients.device)
                size = batch_size(samples)
                filler = samples if filler is None and idle_passes else filler
                number = self._shard_of(seen, size)
                if number in todo:
                    self._take(self._gradients(samples)[0], number, writer)
                    self.samples += size
                seen += size
                bar.update(size)
            if seen != self._store.n_samples:
                raise UsageError(
                    f"the loader yielded {seen} samples, and the store is for {self._store.n_samples}; expected the "
                    "same training set (n_samples= where the loader does not say its length)"
                )
            for samples in [] if filler is None else [filler] * idle_passes:
                self._gradients(samples)
            start = time.perf_counter()
        self.drain = time.perf_counter() - start
        self._waited += self.drain

    def _shard_of(self, first: int, size: int) -> int:
        """Number of the shard that a batch belongs to."""
        store = self._store
        if first + size > store.n_samples:
            raise UsageError(
                f"the loader yields more than the {store.n_samples} samples of the store; expected the same training "
                "set, or another n_samples="
            )
        number, last = first // store.shard_size, (first + size - 1) // store.shard_size
        if last > number:
            raise UsageError(
                f"the batch of samples {first} to {first + size - 1} reaches over the end of shard {number} at "
                f"{(number + 1) * store.shard_size}; expected a shard_size that is a multiple of the batch size, "
                f"{size}"
            )
        return number

    def _take(self, rows: Mapping[str, Tensor], number: int, writer: ShardWriter) -> None:
        size, first = len(next(iter(rows.values()))), 0
        count = len(self._store.shard_rows(number))
        while first < size:
            first = self._block.append(rows, first)
            if self._block.filled == self._block.rows or self._copied + self._block.filled == count:
                self._flush()
        if self._copied == count:
            self._submit(number, count, writer)

    def _flush(self) -> None:
        """Empties the block into the host's memory and the curvature."""
        host, first = self._hosts[self._submitted % 2], self._copied
        coded = {name: encode(part, self._store.dtype) for name, part in self._block.parts()}
        with measured(self._transfer):
            for name, part in coded.items():
                there = host[name].part(slice(first, first + len(part)))
                for target, source in zip(there.tensors(), part.tensors(), strict=True):
                    target.copy_(source, non_blocking=True)
        for part in coded.values():
            self._sums.append(part.decoded().sum(dtype=torch.float32))
        if self._curvature is not None:
            with measured(self._meter), exact_products():
                for name, part in coded.items():
                    if name in self._curvature.sums:
                        self._curvature.add(name, part.decoded())
        self._copied += self._block.filled
        self._block.filled = 0

    def _submit(self, number: int, count: int, writer: ShardWriter) -> None:
        tensors = {name: rows.part(slice(count)) for name, rows in self._hosts[self._submitted % 2].items()}
        ready = None
        if self._gradients.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            ready = event.synchronize
        # One number per layer and block is enough in the usual case, and the device is waited for once per shard.
        if not bool(torch.stack(self._sums).isfinite().all()):
            if ready is not None:
                ready()
            rows = {name: part.decoded() for name, part in tensors.items()}
            check_finite(rows, self._store.shard_rows(number).start)
        self._sums.clear()
        start = time.perf_counter()
        writer.submit(number, tensors, ready)
        self._waited += time.perf_counter() - start
        self._submitted += 1
        self._copied = 0


def check_finite(rows: Mapping[str, Tensor], first: int, what: str = "training sample") -> None:
    """Refuses rows with values that are not finite.

    Args:
        rows: ``{layer: (n, k_l)}``.
        first: Position of the first row.
        what: How messages call a row.

    Raises:
        GrassError: Naming layer and positions.
    """
    for name, part in rows.items():
        bad = torch.nonzero(~part.isfinite().all(dim=1)).flatten()
        if not len(bad):
            continue
        shown = few((bad + first).tolist(), _SHOWN)
        remedy = "look at these samples and the loss"
        if part.dtype == torch.float16:
            remedy += "; float16 ends at 65504, so bfloat16 or float32 may be what is needed"
        raise GrassError(f"gradients of layer {name} are not finite in {part.dtype} at {what} {shown}; {remedy}")


def sample_bytes(layers: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes of a sample's rows in a shard.

    Args:
        layers: Their sizes.
        dtype: Of the stored numbers.
    """
    return sum(row_bytes(k, dtype) for k in layers.values())


def default_shard_size(batch: int, size: int) -> int:
    """The largest multiple of the batch size up to 1,024 samples and 256 MiB by a power of two, or the batch size.

    A power of two, so that batches of half the size, or of a few times the size, fit the shards too.

    Args:
        batch: Samples in a batch.
        size: Bytes of a sample.
    """
    most = min(_SHARD_SIZE, _SHARD_BYTES // size) // batch
    return batch * 2 ** max(most.bit_length() - 1, 0)


def check_fits(samples: int, layers: Mapping[str, int], dtype: torch.dtype, what: str, remedy: str) -> None:
    """Refuses rows that this machine cannot hold, before anything is made for them.

    Args:
        samples: Number of rows that are held at once.
        layers: Their sizes.
        dtype: Of the stored numbers.
        what: What they are, in words.
        remedy: What else helps than fewer features.

    Raises:
        UsageError: They take more memory than the machine has.
    """
    needed, there = samples * sample_bytes(layers, dtype), memory_bytes()
    if needed > there:
        raise UsageError(
            f"{what} takes {needed / 1e9:,.1f} GB ({samples:,} samples of {sum(layers.values()):,} features), and this "
            f"machine has {there / 1e9:,.1f} GB of memory; expected a compression with fewer features{remedy}"
        )


def check_compile(compile: Compile, deterministic: bool) -> None:
    """Refuses kernels that are chosen by timing them, since another run may choose others.

    Raises:
        UsageError: ``compile`` is a mode, or the compiler is set to time kernels while bits have to be the same.
    """
    if not isinstance(compile, bool) and compile != "blocks":
        raise UsageError(f"compile is {compile!r}; expected True, False or 'blocks' (modes are not taken)")
    if compile and deterministic:
        import torch._inductor.config as inductor

        if inductor.max_autotune or inductor.max_autotune_gemm:
            raise UsageError(
                "torch._inductor.config.max_autotune is on, which chooses kernels by timing them; expected it off with "
                "deterministic=True"
            )


def _host_shard(store: Store, device: torch.device) -> dict[str, Rows]:
    rows = min(store.shard_size, store.n_samples)
    pinned = device.type == "cuda" and 2 * rows * sample_bytes(store.layers, store.dtype) <= _PINNED_BYTES
    return {name: empty_rows(rows, size, store.dtype, pin_memory=pinned) for name, size in store.layers.items()}
