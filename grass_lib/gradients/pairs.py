"""Chosen entries of batched products: the sum over tokens of a row of one factor times a row of the other.

Two ways lead there. Gathering both rows of every entry moves memory for kept entries only; multiplying the rectangle
of all rows and columns that occur computes entries that nobody asked for, but at the speed of a matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A product of matrices is so many times faster for an entry than a gather. Measured on one core of a CPU: 22 to 25 with
# 64 to 1,024 tokens; on a GPU 12 bytes of memory traffic stand against two operations in float32.
DENSE_GAIN_CPU, DENSE_GAIN_CUDA = 16, 48
# Elements of scratch: near the caches of a CPU, few launches on a GPU.
SCRATCH_CPU, SCRATCH_CUDA = 1 << 20, 1 << 22


def scratch_elements(device: torch.device) -> int:
    """Elements that intermediate results may have at a time."""
    return SCRATCH_CPU if device.type == "cpu" else SCRATCH_CUDA


def wide(x: Tensor) -> Tensor:
    """Half types as float32, in which products are added."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Pairs:
    """The entries ``(rows[i], columns[i])`` of ``(n, R, C)`` products, in ascending order of the rows.

    Attributes:
        size: Number of entries, m.
        columns: int64 ``(c,)``: columns that occur, ascending; the right factor is given with these alone.
    """

    def __init__(self, rows: Tensor, columns: Tensor, n_rows: int, n_columns: int, device: torch.device) -> None:
        """Lays out the tables.

        Args:
            rows: int64 ``(m,)`` on the CPU, ascending.
            columns: int64 ``(m,)`` on the CPU.
            n_rows: Rows of the left factor.
            n_columns: Columns of the product.
            device: Of the factors.
        """
        self.size = len(rows)
        unique_rows, row_places, counts = torch.unique(rows, return_inverse=True, return_counts=True)
        unique_columns, column_places = torch.unique(columns, return_inverse=True)
        self._starts = [0, *counts.cumsum(0).tolist()]
        self._all_rows, self.all_columns = len(unique_rows) == n_rows, len(unique_columns) == n_columns
        self._rows, self.columns, self._unique_rows = rows.to(device), unique_columns.to(device), unique_rows.to(device)
        self._column_places = column_places.to(device)
        self._cells = (row_places * len(unique_columns) + column_places).to(device)
        self._area = len(unique_rows) * len(unique_columns)
        self._gain = DENSE_GAIN_CPU if device.type == "cpu" else DENSE_GAIN_CUDA

    @property
    def dense(self) -> bool:
        """Whether the whole rectangle is multiplied."""
        return self._area <= self._gain * self.size

    def sums(self, left: Tensor, right: Tensor) -> Tensor:
        """The entries.

        Args:
            left: ``(n, R, tokens)``.
            right: ``(n, c, tokens)``, the rows at `columns`.

        Returns:
            ``(n, m)``, at least float32.
        """
        if left.shape[2] == 1:
            taken = wide(left[:, :, 0].index_select(1, self._rows))
            return taken * wide(right[:, :, 0].index_select(1, self._column_places))
        out = torch.empty(len(left), self.size, device=left.device, dtype=wide(left[:0, :0, :0]).dtype)
        if self.dense:
            self._multiply(left, right, out)
        else:
            self._gather(left.contiguous(), right.contiguous(), out)
        return out

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        left = wide(left if self._all_rows else left.index_select(1, self._unique_rows))
        right, across = wide(right).mT, len(self.columns)
        # Rows in groups, whose rectangles fit the scratch; samples too, where one row of all does not.
        limit = scratch_elements(left.device)
        samples = max(1, min(len(left), limit // across))
        step = max(1, limit // (samples * across))
        for lo in range(0, len(left), samples):
            for row in range(0, len(self._starts) - 1, step):
                end = min(row + step, len(self._starts) - 1)
                begin, stop = self._starts[row], self._starts[end]
                found = (left[lo : lo + samples, row:end] @ right[lo : lo + samples]).flatten(1)
                cells = self._cells[begin:stop] - row * across if row else self._cells[begin:stop]
                out[lo : lo + samples, begin:stop] = found.index_select(1, cells)

    def _gather(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        tokens, limit = left.shape[2], scratch_elements(left.device)
        samples = max(1, min(len(left), limit // (tokens * min(self.size, 64))))
        step = max(1, limit // (samples * tokens))
        for lo in range(0, len(left), samples):
            some_left, some_right = left[lo : lo + samples], right[lo : lo + samples]
            for begin in range(0, self.size, step):
                stop = begin + step
                a = wide(some_left.index_select(1, self._rows[begin:stop]))
                b = wide(some_right.index_select(1, self._column_places[begin:stop]))
                out[lo : lo + samples, begin:stop] = a.mul_(b).sum(dim=2)
