"""Gradients as the training of a mask reads them: batches of rows, a block of columns at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.masks.source import GradientSource

CACHE_BYTES = 4 * 2**30
"""Largest bfloat16 copy of the gradients that is kept in memory unless another budget is given."""
# Columns of a float32 block: with 256 rows 16 MiB, which stays near the processor between its uses.
COLUMNS = 1 << 14

Part: TypeAlias = Callable[[slice], Tensor]


class Rows(Protocol):
    """Some rows of a source."""

    @property
    def n(self) -> int:
        """Number of rows."""
        ...

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Tensor, Part]]:
        """Batches of ``size`` rows: their positions among these rows ``(b,)``, and float32 columns ``(b, width)``."""
        ...

    def columns(self, indices: Tensor) -> Tensor:
        """Float32 ``(n, k)``: some columns of all rows."""
        ...


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Rows of a matrix in memory or in a mapped file.

    Attributes:
        matrix: ``(m, p)``, float32, bfloat16 or another floating type.
        numbers: int64 ``(n,)``: which rows of it.
        scale: Rows are multiplied by its square, given as its root so that a float32 can hold it.
    """

    matrix: Tensor
    numbers: Tensor
    scale: float = 1.0

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.numbers)

    def part(self, positions: Tensor, columns: slice) -> Tensor:
        """Float32 ``(b, width)`` of the rows at some positions ``(b,)``."""
        part = self.matrix[:, columns].index_select(0, self.numbers[positions]).to(torch.float32)
        return part if self.scale == 1.0 else part.mul_(self.scale).mul_(self.scale)

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Tensor, Part]]:
        """As `Rows.batches`, rows in the given order ``(n,)``."""
        for positions in order.to(self.numbers.device).split(size):

            def part(columns: slice, positions: Tensor = positions) -> Tensor:
                return self.part(positions, columns)

            yield positions, part

    def columns(self, indices: Tensor) -> Tensor:
        """As `Rows.columns`."""
        pieces = [self.matrix[rows][:, indices].to(torch.float32) for rows in self.numbers.split(64)]
        found = torch.cat(pieces)
        return found if self.scale == 1.0 else found.mul_(self.scale).mul_(self.scale)


@dataclass(frozen=True, eq=False)
class WalkedRows:
    """Rows of a source that are computed anew in every walk; batches follow its order.

    Attributes:
        source: All rows.
        positions: int64 ``(source.n,)``: the place of each among these rows, -1 for those left out.
    """

    source: GradientSource
    positions: Tensor

    @property
    def n(self) -> int:
        """Number of rows."""
        return int((self.positions >= 0).sum())

    def batches(self, size: int, order: Tensor) -> Iterator[tuple[Tensor, Part]]:
        """As `Rows.batches`, in the source's order; ``order`` is not used."""
        for first, rows in self.source.chunks(size):
            positions = self.positions[first : first + len(rows)]
            kept = torch.nonzero(positions >= 0).flatten()
            if len(kept):

                def part(columns: slice, rows: Tensor = rows, kept: Tensor = kept) -> Tensor:
                    return rows[:, columns].index_select(0, kept)

                yield positions[kept], part

    def columns(self, indices: Tensor) -> Tensor:
        """As `Rows.columns`, in one walk."""
        out = torch.empty(self.n, len(indices), device=self.source.device)
        for positions, part in self.batches(64, self.positions):
            out[positions] = part(slice(None))[:, indices]
        return out


def column_blocks(p: int) -> Iterator[slice]:
    """Slices that cover 0 to p."""
    for start in range(0, p, COLUMNS):
        yield slice(start, min(start + COLUMNS, p))


def hold(
    source: GradientSource, numbers: Tensor, each: Callable[[Tensor], None], *, folder: str | Path | None = None
) -> Tensor:
    """Walks a source once and keeps some rows in bfloat16.

    Args:
        source: All rows.
        numbers: int64, ascending: the rows to keep.
        each: Called with every block, kept or not.
        folder: Keeps them in a temporary file there, mapped into memory and already unlinked; None keeps them in memory
            on the source's device.

    Returns:
        ``(len(numbers), p)`` bfloat16.

    Raises:
        UsageError: The folder does not exist.
    """
    shape = (len(numbers), source.p)
    if folder is None:
        held = torch.empty(shape, dtype=torch.bfloat16, device=source.device)
    else:
        if not Path(folder).is_dir():
            raise UsageError(f"cache_folder {str(folder)!r} does not exist; make it first")
        with tempfile.NamedTemporaryFile(dir=folder, prefix="mask_rows_") as file:
            held = torch.from_file(file.name, shared=True, size=shape[0] * shape[1], dtype=torch.bfloat16).view(shape)
    place = torch.full((source.n,), -1, dtype=torch.int64, device=source.device)
    place[numbers.to(source.device)] = torch.arange(len(numbers), device=source.device)
    seen = 0
    for block in source:
        each(block)
        where = place[seen : seen + len(block)]
        kept = where >= 0
        # Ascending numbers lie next to each other in the copy.
        if bool(kept.any()):
            targets = where[kept]
            first = int(targets[0])
            held[first : first + len(targets)] = block if bool(kept.all()) else block[kept]
        seen += len(block)
    return held
