"""The empirical Fisher matrix of each layer, ``F = G^T G / n``, summed over rows in fixed blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from grass_lib.ranks import Ranks
from grass_lib.store import Store
from grass_lib.store.formats import Rows

_BLOCK_BYTES = 128 * 2**20


class RowBlock:
    """Rows of all layers on the device, one after the other, until the block is full.

    How many rows a block has depends on layers, dtype and shard size only. Rows that are computed and rows that are
    read back from a store therefore pass through the same memory in the same portions, so that sums over them have the
    same bits.

    Attributes:
        filled: Rows at present.
    """

    def __init__(self, layers: Mapping[str, int], shard_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the block.

        Args:
            layers: Features per layer.
            shard_size: Rows of a shard; a block is never longer.
            dtype: Of the stored rows.
            device: Where the block is.
        """
        self.rows = block_rows(sum(layers.values()) * dtype.itemsize, shard_size)
        self.filled = 0
        self._parts = {name: torch.empty(self.rows, size, dtype=dtype, device=device) for name, size in layers.items()}

    def append(self, rows: Mapping[str, Tensor], first: int) -> int:
        """Copies rows, rounded to the block's dtype, for as long as there is room.

        Args:
            rows: ``{layer: (batch, k_l)}``.
            first: Position in ``rows`` of the first that is copied.

        Returns:
            Position in ``rows`` of the first that was not copied.
        """
        size = len(next(iter(rows.values())))
        count = min(size - first, self.rows - self.filled)
        into = [part[self.filled : self.filled + count] for part in self._parts.values()]
        given = [rows[name][first : first + count] for name in self._parts]
        torch._foreach_copy_(into, given)  # pyright: ignore[reportPrivateImportUsage]
        self.filled += count
        return first + count

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Each layer's rows ``(filled, k_l)``."""
        for name, part in self._parts.items():
            yield name, part[: self.filled]


class Curvature:
    """Sums ``G^T G`` of layers.

    Attributes:
        sums: ``{layer: (k_l, k_l)}`` in ``dtype``.
    """

    def __init__(self, layers: Mapping[str, int], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Starts at 0.

        Args:
            layers: Features per layer.
            device: Where the sums are.
            dtype: Of the sums, float32 or float64.
        """
        self.sums = {name: torch.zeros(size, size, device=device, dtype=dtype) for name, size in layers.items()}

    def add(self, name: str, rows: Tensor) -> None:
        """Adds rows ``(n, k_l)`` of one layer, in any floating dtype, on the device."""
        total = self.sums[name]
        narrow = total.dtype == torch.float32 and rows.dtype == torch.bfloat16
        if rows.is_cuda and narrow and "dtype" in torch.ops.aten.mm.overloads():  # from PyTorch 2.8 on
            # The products are exact in float32, and tensor cores add them up in float32. (Sums of float16 may be
            # rounded to float16 on the way, which is why they take the other road.)
            total.add_(torch.mm(rows.mT, rows, out_dtype=torch.float32))
            return
        rows = rows.to(total.dtype)
        total.addmm_(rows.mT, rows)


def stream_curvature(
    store: Store, layers: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float32
) -> Curvature:
    """Sums of a complete store's rows, read once, with the bits that `Curvature` has when it grows with the store.

    Args:
        store: A complete store.
        layers: Names of the layers wanted.
        device: Where to compute.
        dtype: Of the sums.

    Raises:
        StoreError: A shard is missing, damaged or cannot be read.
    """
    sizes = {name: store.layers[name] for name in layers}
    curvature = Curvature(sizes, device, dtype)
    if not sizes:
        return curvature
    block = _StreamBlock(store, sizes, device)
    for _, name, rows in store.stream_rows(layers=layers):
        for part in block.portions(name, rows):
            curvature.add(name, part)
    return curvature


def reduce_curvature(curvature: Curvature, layers: Sequence[str], ranks: Ranks) -> None:
    """Sums over ranks, layer by layer and in place, at the rank that a layer belongs to; the others let theirs go.

    Args:
        curvature: This rank's sums.
        layers: Names of all layers, the same on every rank.
        ranks: The processes.
    """
    for place, name in enumerate(layers):
        if name in curvature.sums:
            ranks.add_at(ranks.owner(place), curvature.sums[name])
            if not ranks.owns(place):
                del curvature.sums[name]


def layer_rows(store: Store, layers: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """All rows ``(n_samples, k_l)`` of layers, in the store's ``row_dtype``, by one pass over the store.

    Args:
        store: A complete store.
        layers: Their names.
        device: Where to put them.

    Raises:
        StoreError: A shard is missing, damaged or cannot be read.
    """
    result = {
        name: torch.empty(store.n_samples, store.layers[name], dtype=store.row_dtype, device=device) for name in layers
    }
    for samples, name, rows in store.stream_rows(layers=layers):
        result[name][samples.start : samples.stop].copy_(rows.to(device).decoded())
    return result


def block_rows(row_bytes: int, shard_size: int) -> int:
    """Rows per block: a power of two within 128 MiB, or the whole shard."""
    fitting = max(1, _BLOCK_BYTES // row_bytes)
    return min(shard_size, 1 << (fitting.bit_length() - 1))


def slices(length: int, row_bytes: int) -> Iterator[slice]:
    """Portions of ``length`` rows within 128 MiB each, at least one row."""
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def groups_within(names: Iterable[str], size: Callable[[str], int], most: int) -> Iterator[list[str]]:
    """Consecutive names whose sizes stay within a bound together, at least one, for walks that open every shard.

    Args:
        names: Of layers.
        size: Bytes that one needs.
        most: Bytes of a group.
    """
    group, held = list[str](), 0
    for name in names:
        needed = size(name)
        if group and held + needed > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += needed
    if group:
        yield group


class _StreamBlock:
    """Passes a store's rows through memory like that of `RowBlock`, layer by layer."""

    def __init__(self, store: Store, sizes: Mapping[str, int], device: torch.device) -> None:
        self._rows = block_rows(sum(store.layers.values()) * store.row_dtype.itemsize, store.shard_size)
        self._device = device
        self._buffers = {
            size: torch.empty(self._rows, size, dtype=store.row_dtype, device=device) for size in set(sizes.values())
        }

    def portions(self, name: str, rows: Rows) -> Iterable[Tensor]:
        buffer = self._buffers[rows.shape[1]]
        for start in range(0, len(rows), self._rows):
            part = buffer[: min(self._rows, len(rows) - start)]
            given = rows.part(slice(start, start + len(part)))
            yield part.copy_(given.codes if given.scales is None else given.to(self._device).decoded())
