"""The sparse Johnson-Lindenstrauss transform: every input coordinate is added, with a sign, to c outputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe, tile_elements
from grass_lib.rng import Stream, scale_words

# Nonzeros whose words are computed at once: 32 bytes each.
_TABLE_CHUNK = 1 << 20
# Input columns transposed at once on a GPU; more rows than this gain no bandwidth.
_CUDA_BYTES = 2 << 30


class SJLTProjector(Projector):
    """``y[r(j, i)] += s(j, i) x[j] / sqrt(c)`` for the c nonzeros i of every column j (Kane and Nelson, 2014).

    Destinations are uniform and independent, also within one column, as in the package ``sjlt``: two nonzeros of a
    column may meet, and the operator is an isometry in expectation for every c and k. The variance of ``<P x, P y>`` is
    ``((sum x^2)(sum y^2) + (sum x y)^2 - 2 sum x^2 y^2) / k + 2 (1 - 1/c) sum x^2 y^2 / k``.

    The table takes 5 bytes per nonzero. Sums run over j in ascending order on every device, without float atomics, so
    results are deterministic: rows are scattered one after the other on a CPU; on a GPU every output gathers its own
    columns, sorted by destination. For c > 1 a CPU adds one nonzero of all columns after the other.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.stage.k is None or recipe.stage.param is None:
            raise UsageError(f"{recipe.stage} is not a flat sjlt")
        super().__init__(recipe, recipe.stage.k)
        self.c = recipe.stage.param
        self.destinations, self.signs = sjlt_table(recipe.stream, self.p, self.k, self.c, self.device)
        self._by_destination: tuple[Tensor, Tensor, Tensor] | None = None

    def _project(self, rows: Tensor) -> Tensor:
        out = self._scatter(rows) if self.device.type == "cpu" else self._gather(rows)
        return out if self.c == 1 else out.mul_(1.0 / math.sqrt(self.c))

    def _scatter(self, rows: Tensor) -> Tensor:
        dtype = self.accumulate_dtype
        out = torch.zeros((rows.shape[0], self.k), dtype=dtype, device=self.device)
        # Few rows at once: their signed copy stays in the cache.
        step = max(1, min(32, 4 * tile_elements(self.device, dtype) // self.p))
        for nonzero in range(self.c):
            # A 64-bit index and a float sign are several times faster here than the compact table.
            index, sign = self.destinations[:, nonzero].long(), self.signs[:, nonzero].to(dtype)
            for start in range(0, rows.shape[0], step):
                block = rows[start : start + step].to(dtype) * sign
                out[start : start + step].index_add_(1, index, block)
        return out

    def _gather(self, rows: Tensor) -> Tensor:
        dtype = self.accumulate_dtype
        if self._by_destination is None:
            flat = self.destinations.reshape(-1)
            order = torch.argsort(flat, stable=True)
            ends = torch.bincount(flat, minlength=self.k).cumsum(0)
            offsets = torch.cat([ends.new_zeros(1), ends])
            self._by_destination = ((order // self.c).int(), offsets.int(), self.signs.reshape(-1)[order])
        columns, offsets, signs = self._by_destination
        weights = signs.to(dtype)
        out = torch.empty((rows.shape[0], self.k), dtype=dtype, device=self.device)
        step = max(1, _CUDA_BYTES // (self.p * dtype.itemsize))
        for start in range(0, rows.shape[0], step):
            block = rows[start : start + step]
            transposed = torch.empty((self.p, block.shape[0]), dtype=dtype, device=self.device).copy_(block.t())
            sums = F.embedding_bag(
                columns, transposed, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
            )
            out[start : start + step].copy_(sums.t())
        return out


def sjlt_table(stream: Stream, p: int, k: int, c: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Destinations and signs of an SJLT.

    The nonzero i of column j has the counter (j low, i, j high, 0): word 0 times k gives the destination (high word),
    the lowest bit of word 1 the sign.

    Args:
        stream: The random stream.
        p: Input size.
        k: Output size.
        c: Nonzeros per column.
        device: Where to compute.

    Returns:
        ``(destinations (p, c) int32 in [0, k), signs (p, c) int8, 1 or -1)``.
    """
    destinations = torch.empty((p, c), dtype=torch.int32, device=device)
    signs = torch.empty((p, c), dtype=torch.int8, device=device)
    step = max(1, _TABLE_CHUNK // c)
    nonzero = torch.arange(c, device=device)
    for start in range(0, p, step):
        column = torch.arange(start, min(p, start + step), device=device).unsqueeze(1)
        words = stream.words(column & 0xFFFFFFFF, nonzero, column >> 32)
        destinations[start : start + step] = scale_words(words[..., 0], k)
        signs[start : start + step] = (words[..., 1] & 1) * 2 - 1
    return destinations, signs
