"""The packed table that the SJLT kernel walks: which column goes where, in an order that needs no atomics.

Columns are cut into tiles. Inside a tile the entries (one a nonzero) are dealt to *lane groups* so that all entries of
one destination fall to one group, and so that group ``g`` of a warp only gets destinations with ``d % lanes == g``,
which lie in its own memory banks. Every group of a tile is padded to the same even length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError

_ENTRIES_AT_ONCE = 1 << 24  # bounds the memory of the sort to about 1 GB


@dataclass(frozen=True)
class Layout:
    """How a table is cut; the kernel is compiled for the first three.

    Attributes:
        rows: Rows of the batch that one thread block owns, a power of two up to 8.
        tile: Columns a tile, a multiple of 32.
        warps: Warps a thread block.
        k_pass: Destinations held at once; more are served in several passes over the input.
        copies: Partial sums a destination: spreads the work where k is small.
    """

    rows: int
    tile: int
    warps: int
    k_pass: int
    copies: int

    def __post_init__(self) -> None:
        """Checks that an entry's parts fit their bits."""
        if self.rows not in (1, 2, 4, 8):
            raise UsageError(f"rows must be 1, 2, 4 or 8, got {self.rows}")
        if not 32 <= self.tile <= 1 << 15 or self.tile % 32:
            raise UsageError(f"tile must be a multiple of 32 up to 32768, got {self.tile}")
        if self.sum_rows > 1 << 16:
            raise UsageError(f"k_pass * copies must stay under 65,536, got {self.k_pass} * {self.copies}")

    @property
    def lanes(self) -> int:
        """Lane groups a warp."""
        return 32 // self.rows

    @property
    def groups(self) -> int:
        """Lane groups a thread block."""
        return self.lanes * self.warps

    @property
    def sum_rows(self) -> int:
        """Sums a row of the batch, with one spare for each lane group, where padding entries go."""
        return -(-self.k_pass * self.copies // self.lanes) * self.lanes + self.lanes


@dataclass(frozen=True)
class Table:
    """A packed SJLT.

    Attributes:
        layout: How it was cut.
        entries: ``(steps, groups, 2)`` int32, ``destination << 16 | sign << 15 | column in tile``.
        offsets: ``(passes, tiles + 1)`` int32, the first step of each tile.
        longest: Steps of the longest tile.
        tiles: Number of tiles.
        passes: Number of destination passes.
    """

    layout: Layout
    entries: Tensor
    offsets: Tensor
    longest: int
    tiles: int
    passes: int


def build_table(destinations: Tensor, negative: Tensor, k: int, layout: Layout) -> Table:
    """Packs an SJLT; runs on the device of its arguments.

    Args:
        destinations: ``(p, c)`` integers in ``[0, k)``.
        negative: ``(p, c)`` bool, True where the nonzero is -1.
        k: Number of destinations.
        layout: How to cut.

    Returns:
        The table, about 1.2 to 1.5 times ``4 * p * c`` bytes.
    """
    p, c = destinations.shape
    tiles = -(-p // layout.tile)
    passes = -(-k // layout.k_pass)
    tiles_at_once = max(1, _ENTRIES_AT_ONCE // (layout.tile * c))
    entries: list[Tensor] = []
    steps: list[Tensor] = []
    for number in range(passes):
        for first in range(0, tiles, tiles_at_once):
            last = min(tiles, first + tiles_at_once)
            span = slice(first * layout.tile, last * layout.tile)
            packed, counts = _pack(destinations[span], negative[span], number * layout.k_pass, last - first, layout)
            entries.append(packed)
            steps.append(counts)
    counts = torch.cat(steps).reshape(passes, tiles)
    ends = counts.flatten().cumsum(0).reshape(passes, tiles)
    offsets = torch.cat([(ends[:, :1] - counts[:, :1]), ends], 1)
    longest = int(counts.max()) if counts.numel() else 0
    return Table(layout, torch.cat(entries), offsets.to(torch.int32).contiguous(), longest, tiles, passes)


def _pack(destinations: Tensor, negative: Tensor, k_begin: int, tiles: int, layout: Layout) -> tuple[Tensor, Tensor]:
    device = destinations.device
    lanes, groups, warps = layout.lanes, layout.groups, layout.warps
    rows, c = destinations.shape
    column = torch.arange(rows, device=device).repeat_interleave(c)
    tile = column // layout.tile
    column -= tile * layout.tile
    target = destinations.reshape(-1).to(torch.int64) - k_begin
    sign = negative.reshape(-1).to(torch.int64)
    if layout.k_pass * layout.copies and (k_begin or bool((target >= layout.k_pass).any())):
        here = (target >= 0) & (target < layout.k_pass)
        column, tile, target, sign = column[here], tile[here], target[here], sign[here]
    target = target * layout.copies + column % layout.copies

    # First sort: by tile, bank class and destination; a run of equal destinations goes to one warp as a whole.
    bank = target % lanes
    segment = tile * lanes + bank
    key = segment * layout.sum_rows + target
    key, order = key.sort(stable=True)
    segment = segment[order]
    sizes = torch.bincount(segment, minlength=tiles * lanes)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(key.numel(), device=device)
    fresh = torch.ones_like(key, dtype=torch.bool)
    fresh[1:] = key[1:] != key[:-1]
    run_start = torch.where(fresh, place, 0).cummax(0).values if key.numel() else place
    warp = (run_start - starts[segment]) * warps // sizes[segment]
    column, target, sign, tile, bank = column[order], target[order], sign[order], tile[order], bank[order]

    # Second sort: inside a group the order is free, so groups of one warp start with columns of different banks.
    group = tile * groups + warp * lanes + bank
    order = (group * lanes + (column + bank) % lanes).argsort(stable=True)
    group, column, target, sign = group[order], column[order], target[order], sign[order]
    sizes = torch.bincount(group, minlength=tiles * groups)
    starts = sizes.cumsum(0) - sizes
    position = torch.arange(group.numel(), device=device) - starts[group]
    steps = (sizes.reshape(tiles, groups).amax(1) + 1) // 2
    first_step = steps.cumsum(0) - steps

    spare = layout.sum_rows - lanes + torch.arange(groups, device=device) % lanes
    packed = (spare << 16)[None, :, None].repeat(int(steps.sum()), 1, 2)
    step = first_step[group // groups] + position // 2
    packed.view(-1)[(step * groups + group % groups) * 2 + position % 2] = (target << 16) | (sign << 15) | column
    return _int32(packed), steps


def _int32(values: Tensor) -> Tensor:
    return torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32)
