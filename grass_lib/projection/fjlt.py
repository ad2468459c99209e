"""The blocked fast Johnson-Lindenstrauss transform: signs, Walsh-Hadamard, and k random rows per block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe, tile_elements
from grass_lib.rng import Stream

# Hadamard factors of at most 2**6: larger ones waste arithmetic, smaller ones passes over memory.
_FACTOR_BITS = 6


class FJLTProjector(Projector):
    """``P x = sum over blocks of sqrt(n / k) S_b H_b D_b x_b`` with n = 2^m >= k, the last block padded with zeros.

    D_b holds random signs, H_b is the orthonormal Walsh-Hadamard matrix and S_b picks k of its n rows without
    replacement, in random order and with random signs (Ailon and Chazelle 2009 for one block; the blocks keep memory
    small). Order and signs matter: with rows in one common order, equal positions of two blocks would meet in every
    output, and without signs the first positions still would, because their column of H_b is constant. The variance of
    ``<P x, P y>`` is the sum over pairs l < m of ``(x_l y_m + x_m y_l)^2`` times 1/k, or (n - k) / (k (n - 1)) where l
    and m are in one block.

    The rows that the paper calls fjlt were a dense Rademacher projection; `paper_scale` is that operator's missing
    1/sqrt(k).
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.stage.k is None:
            raise UsageError(f"{recipe.stage} is not a flat fjlt")
        super().__init__(recipe, recipe.stage.k)
        self.n = 1 << (self.k - 1).bit_length()
        self.blocks = -(-self.p // self.n)
        self.signs = fjlt_signs(recipe.stream, self.p, self.device)
        self.rows, self.row_signs = fjlt_rows(recipe.stream, self.blocks, self.n, self.k, self.device)
        self._factors = [_hadamard(bits, self.accumulate_dtype, self.device) for bits in _split_bits(self.n)]

    @property
    def paper_scale(self) -> float:
        """The reference's fjlt lacks the factor 1/sqrt(k)."""
        return math.sqrt(self.k)

    def _project(self, rows: Tensor) -> Tensor:
        dtype, n = self.accumulate_dtype, self.n
        # Samples come last in scratch memory: the transform and the row choice then work on contiguous rows.
        budget = tile_elements(self.device, dtype)
        batch = max(1, min(rows.shape[0], budget // n))
        group = max(1, budget // (4 * n * batch))
        out = torch.empty((rows.shape[0], self.k), dtype=dtype, device=self.device)
        for first in range(0, rows.shape[0], batch):
            part = rows[first : first + batch]
            total = torch.zeros((self.k, part.shape[0]), dtype=dtype, device=self.device)
            for block in range(0, self.blocks, group):
                total += self._blocks(part, block, min(self.blocks, block + group))
            out[first : first + batch] = total.t()
        return out.mul_(1.0 / math.sqrt(self.k))

    def _blocks(self, part: Tensor, first: int, last: int) -> Tensor:
        """Sum of S H D x over blocks first .. last - 1, unscaled, ``(k, batch)``; entries of H are 1 and -1."""
        start, end = first * self.n, min(self.p, last * self.n)
        count, batch = last - first, part.shape[0]
        values = torch.empty((count * self.n, batch), dtype=self.accumulate_dtype, device=self.device)
        values[: end - start].copy_(part[:, start:end].t())
        values[: end - start].mul_(self.signs[start:end].unsqueeze(1))
        values[end - start :].zero_()
        outer, inner = count, self.n
        for factor in self._factors:
            size = factor.shape[0]
            inner //= size
            values = torch.matmul(factor, values.view(outer, size, inner * batch))
            outer *= size
        base = torch.arange(count, device=self.device).unsqueeze(1) * self.n
        picked = values.view(count * self.n, batch).index_select(0, (self.rows[first:last] + base).reshape(-1))
        picked.mul_(self.row_signs[first:last].reshape(-1, 1))
        return picked.view(count, self.k, batch).sum(0)


def fjlt_signs(stream: Stream, p: int, device: torch.device) -> Tensor:
    """Random signs ``(p,)`` int8: coordinate j has bit j % 32 of word j % 128 // 32 at the counter (j // 128, 0)."""
    words = stream.words(torch.arange(-(-p // 128), device=device))
    bits = words.unsqueeze(-1) >> torch.arange(32, device=device) & 1
    return (bits * 2 - 1).to(torch.int8).reshape(-1)[:p]


def fjlt_rows(stream: Stream, blocks: int, n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that each block keeps, in random order, and their signs.

    They are the first k of the n positions ordered by 64-bit keys; position t of block b has its key in the call with
    counter (b, 1 + t // 2): words 0 and 1 for even t, 2 and 3 for odd t. The key's lowest bit is the sign of the row.

    Returns:
        ``(rows (blocks, k) int32, signs (blocks, k) int8)``.
    """
    rows = torch.empty((blocks, k), dtype=torch.int32, device=device)
    signs = torch.empty((blocks, k), dtype=torch.int8, device=device)
    call = torch.arange(1, 1 + -(-n // 2), device=device)
    step = max(1, (1 << 22) // n)
    for start in range(0, blocks, step):
        block = torch.arange(start, min(blocks, start + step), device=device).unsqueeze(1)
        words = stream.words(block, call)
        keys = (words[..., 0::2] << 32 | words[..., 1::2]).reshape(block.shape[0], -1)[:, :n]
        ordered, order = torch.sort(keys, dim=1, stable=True)
        rows[start : start + step] = order[:, :k]
        signs[start : start + step] = (ordered[:, :k] & 1) * 2 - 1
    return rows, signs


def _split_bits(n: int) -> list[int]:
    """Splits log2 n into near-equal parts of at most `_FACTOR_BITS`."""
    bits = n.bit_length() - 1
    parts = max(1, -(-bits // _FACTOR_BITS))
    return [bits // parts + (part < bits % parts) for part in range(parts)]


def _hadamard(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Walsh-Hadamard matrix of size 2**bits with entries 1 and -1, in Sylvester's order."""
    matrix = torch.ones((1, 1), dtype=dtype, device=device)
    for _ in range(bits):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
