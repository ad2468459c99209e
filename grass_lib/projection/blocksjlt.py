"""The block-permuted SJLT, an extension beyond the paper: as sparse as an SJLT with c = 1, and evenly dealt."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.projection.base import Projector, Recipe
from grass_lib.projection.sjlt import SJLTProjector
from grass_lib.rng import Stream

TILE = 1024
"""Columns that are dealt together; part of the operator's definition."""

BLOCKS = 64
"""Output blocks, or the largest power of two not above k; output d belongs to block d % BLOCKS."""

_AT_ONCE = 1 << 20  # columns drawn at once


class BlockSJLTProjector(SJLTProjector):
    """``y[r(j)] += s(j) x[j]`` with the columns of each tile dealt evenly to the output blocks by a random permutation.

    Columns are cut into tiles of 1,024. In a tile a random permutation gives every one of 64 output blocks 16 columns;
    inside its block a column's destination is uniform. So work on a GPU is balanced by construction (compare the block
    permutations of FlashSketch, arXiv 2602.06071, which permute whole blocks of the input), and two columns of one tile
    meet less often than in an SJLT: with probability 15/1023 of sharing a block instead of 1/64. Columns of different
    tiles meet as in an SJLT. An isometry in expectation for every k, because every column has one entry of 1 or -1.

    Its spec is ``blocksjlt-K``. Nothing chooses it by default.
    """

    def __init__(self, recipe: Recipe) -> None:
        if recipe.stage.k is None:
            raise UsageError(f"{recipe.stage} is not a flat blocksjlt")
        Projector.__init__(self, recipe, recipe.stage.k)
        self.c = 1
        self.destinations, self.signs = block_table(recipe.stream, self.p, self.k, self.device)
        self._by_destination = None


def block_table(stream: Stream, p: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Destinations and signs of a block-permuted SJLT.

    Column j has the counter (j low, 0, j high, 0): word 0 gives the place in its block, the lowest bit of word 1 the
    sign, words 2 and 3 the 64-bit key that orders the columns of a tile. Places past the last column count as columns,
    so the last tile is dealt as any other.

    Args:
        stream: The random stream.
        p: Input size.
        k: Output size.
        device: Where to compute.

    Returns:
        ``(destinations (p, 1) int32 in [0, k), signs (p, 1) int8, 1 or -1)``.
    """
    blocks = min(BLOCKS, 1 << (k.bit_length() - 1))
    sizes = (k - torch.arange(blocks, device=device) + blocks - 1) // blocks
    destinations = torch.empty((p, 1), dtype=torch.int32, device=device)
    signs = torch.empty((p, 1), dtype=torch.int8, device=device)
    for start in range(0, p, _AT_ONCE):
        end = min(p, start + _AT_ONCE)
        column = torch.arange(start, start + -(-(end - start) // TILE) * TILE, device=device)
        words = stream.words(column & 0xFFFFFFFF, 0, column >> 32)
        keys = (words[:, 2] << 32 | words[:, 3]).view(-1, TILE)
        order = keys.argsort(dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(TILE, device=device).expand_as(order))
        block = (rank // (TILE // blocks)).view(-1)
        place = words[:, 0] * sizes[block] >> 32
        destinations[start:end, 0] = (place * blocks + block)[: end - start]
        signs[start:end, 0] = ((words[:, 1] & 1) * 2 - 1)[: end - start]
    return destinations, signs
