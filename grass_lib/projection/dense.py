"""Dense random projections whose matrix is computed tile by tile and never held."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe, tile_elements
from grass_lib.rng import box_muller


class DenseProjector(Projector):
    """``P x = M^T x / sqrt(k)`` with independent entries M[j, t] of mean 0 and variance 1.

    Every call computes the matrix again, once whatever the number of samples: give many samples at once. A tile takes
    4 MiB on a CPU and 256 MiB on a GPU, its random words about four times that.
    """

    # Output columns that one Philox call covers.
    columns_per_call: int

    def __init__(self, recipe: Recipe) -> None:
        if recipe.stage.k is None:
            raise UsageError(f"{recipe.stage} is not a flat dense projection")
        super().__init__(recipe, recipe.stage.k)
        self.stream = recipe.stream

    def _project(self, rows: Tensor) -> Tensor:
        dtype, step = self.accumulate_dtype, self.columns_per_call
        budget = tile_elements(self.device, dtype)
        calls = -(-self.k // step)
        # Wide tiles, but at least 128 rows high, so that the products have something to sum over.
        wide = max(1, min(calls, budget // 128 // step))
        high = max(1, min(self.p, budget // (wide * step)))
        out = torch.empty((rows.shape[0], self.k), dtype=dtype, device=self.device)
        for call in range(0, calls, wide):
            count = min(wide, calls - call)
            total = torch.zeros((rows.shape[0], count * step), dtype=dtype, device=self.device)
            for start in range(0, self.p, high):
                end = min(self.p, start + high)
                total.addmm_(rows[:, start:end].to(dtype), self._tile(start, end, call, call + count))
            left, right = call * step, min(self.k, (call + count) * step)
            out[:, left:right] = self._in_order(total)[:, : right - left]
        return out.mul_(1.0 / math.sqrt(self.k))

    def _words(self, start: int, end: int, call: int, last: int) -> Tensor:
        """Words ``(end - start, last - call, 4)``; row j and call q have the counter (j low, q, j high, 0)."""
        row = torch.arange(start, end, device=self.device).unsqueeze(1)
        return self.stream.words(row & 0xFFFFFFFF, torch.arange(call, last, device=self.device), row >> 32)

    @abstractmethod
    def _tile(self, start: int, end: int, call: int, last: int) -> Tensor:
        """Rows start .. end - 1 of M for the calls call .. last - 1, ``(rows, calls * columns_per_call)``."""

    def _in_order(self, columns: Tensor) -> Tensor:
        """Brings output columns from the order of `_tile` into the matrix's own."""
        return columns


class NormalProjector(DenseProjector):
    """Standard normal entries. The call (row, t // 4) gives columns 4q .. 4q + 3 by two Box-Muller pairs."""

    columns_per_call = 4

    def _tile(self, start: int, end: int, call: int, last: int) -> Tensor:
        words = self._words(start, end, call, last)
        # All first columns of the calls, then all second ones, ...: contiguous writes. `_in_order` undoes it.
        tile = torch.empty((end - start, 4, last - call), dtype=self.accumulate_dtype, device=self.device)
        for pair in (0, 2):
            cosine, sine = box_muller(words[..., pair], words[..., pair + 1], self.accumulate_dtype)
            tile[:, pair].copy_(cosine)
            tile[:, pair + 1].copy_(sine)
        return tile.view(end - start, -1)

    def _in_order(self, columns: Tensor) -> Tensor:
        return columns.view(columns.shape[0], 4, -1).transpose(1, 2).reshape(columns.shape)


class RademacherProjector(DenseProjector):
    """Entries 1 and -1. The call (row, t // 128) gives 128 columns: bit t % 32 of word t % 128 // 32, set for 1."""

    columns_per_call = 128

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        byte = torch.arange(256, device=self.device).unsqueeze(1)
        bits = byte >> torch.arange(8, device=self.device) & 1
        # The eight signs of every byte: a look-up is several times cheaper than shifting single bits.
        self._signs = (bits * 2 - 1).to(self.accumulate_dtype)

    def _tile(self, start: int, end: int, call: int, last: int) -> Tensor:
        words = self._words(start, end, call, last).unsqueeze(-1)
        each = words >> torch.arange(0, 32, 8, device=self.device) & 0xFF
        return F.embedding(each, self._signs).reshape(end - start, -1)
