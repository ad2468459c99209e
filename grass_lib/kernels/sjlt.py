"""The SJLT on the GPU, and the same kernel over kept coordinates only (`grass`); the reference is `projection.sjlt`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc
from grass_lib.kernels.launch import element_size, finish, flat_rows, part_buffer
from grass_lib.kernels.sjlt_table import Layout, Table, build_table

_SIGNATURE = "PlilPPPiPifiiiiii"
_TILE_BYTES = 16384  # of one stage: with three in flight enough to cover the latency of device memory
_WARPS = 16
_RESERVED = 1024  # shared memory that the driver and static variables take from a block


@dataclass(frozen=True)
class Tuning:
    """Choices that change speed and the order of additions, never the operator; None picks by shape and device.

    Attributes:
        rows: Rows a thread block owns.
        tile: Columns a tile.
        warps: Warps a thread block.
        stages: Tiles in flight.
        blocks: Thread blocks a multiprocessor that the split over columns aims at.
    """

    rows: int | None = None
    tile: int | None = None
    warps: int = _WARPS
    stages: int | None = None
    blocks: int | None = None


class SjltKernel:
    """A fixed SJLT on one GPU: tables are packed at the first call of a kind and kept.

    Args:
        destinations: ``(p, c)`` integers in ``[0, k)`` on the GPU.
        negative: ``(p, c)`` bool on the GPU.
        k: Output dimension.
        scale: Factor on every output (``1 / sqrt(c)``, times a mask's factor).
        columns: ``(p,)`` int64 kept columns of the input, or None where the input has the ``p`` columns themselves.
        tuning: Overrides, for measurements.
    """

    def __init__(
        self,
        destinations: Tensor,
        negative: Tensor,
        k: int,
        scale: float,
        *,
        columns: Tensor | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self._destinations = destinations
        self._negative = negative
        self.p, self.c = destinations.shape
        self.k = k
        self.scale = scale
        self.device = destinations.device
        self._columns = None if columns is None else columns.contiguous()
        self._tuning = tuning or Tuning()
        self._tables: dict[Layout, Table] = {}

    def layout(self, batch: int, width: int) -> Layout:
        """The cut for ``batch`` rows of elements of ``width`` bytes: the cheapest by an estimate of the bytes moved."""
        if self._tuning.rows is not None:
            return self._cut(self._tuning.rows, width)
        best, best_cost = self._cut(1, width), float("inf")
        for rows in (8, 4, 2, 1):
            if rows > 1 and rows >= 2 * batch:
                continue
            layout = self._cut(rows, width)
            if rows > 1 and layout.k_pass < self.k:
                continue
            cost = self._cost(layout, batch, width)
            if cost < best_cost:
                best, best_cost = layout, cost
        return best

    def _cut(self, rows: int, width: int) -> Layout:
        limit = nvrtc.shared_memory(self.device) - _RESERVED
        width = 4 if self._columns is not None else width
        room = max(limit * 6 // 10, limit - 4 * (_TILE_BYTES * 3 // 2))
        tile = self._tuning.tile
        if tile is None:
            tile = _TILE_BYTES // (rows * width)
            while tile > 64 and tile * self.c > 4 * _TILE_BYTES // rows:
                tile //= 2
        copies = 1
        while self.k * copies * 2 <= 1024:
            copies *= 2
        k_pass = min(self.k, (room // (4 * rows) - 64) // copies)
        passes = -(-self.k // k_pass)
        return Layout(rows, tile, self._tuning.warps, -(-self.k // passes), copies)

    def _cost(self, layout: Layout, batch: int, width: int) -> float:
        row_groups = -(-batch // layout.rows)
        tiles = -(-self.p // layout.tile)
        slots = nvrtc.processors(self.device)
        _, cost = _splits(row_groups, tiles, slots, _TILE_BYTES, 8 * batch * self.k)
        table_bytes = 5.0 * self.p * self.c * row_groups  # read from the L2 cache by every row group
        return cost + 0.7 * table_bytes

    def table(self, layout: Layout) -> Table:
        """The packed table for a layout, built at first use."""
        if layout not in self._tables:
            self._tables[layout] = build_table(self._destinations, self._negative, self.k, layout)
        return self._tables[layout]

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Projects ``(n, p)`` (with ``columns``: ``(n, any)``) to ``(n, k)`` of type ``dtype``."""
        x = flat_rows(x)
        batch = x.shape[0]
        if batch == 0:
            return torch.empty(0, self.k, dtype=dtype, device=x.device)
        width = element_size(x)
        layout = self.layout(batch, width)
        table = self.table(layout)
        gathers = self._columns is not None
        tile_width = 4 if gathers else width
        pitch = layout.tile * tile_width + 4 * max(4, layout.lanes)
        entry_bytes = table.longest * layout.groups * 8
        sums = layout.sum_rows * layout.rows * 4
        stage = layout.rows * pitch + entry_bytes
        limit = nvrtc.shared_memory(self.device) - _RESERVED
        stages, resident = self._stages(sums, stage, limit, gathers)
        shared = sums + stages * stage
        row_groups = -(-batch // layout.rows)
        slots = nvrtc.processors(self.device) * resident
        splits, _ = _splits(row_groups * table.passes, table.tiles, slots, _TILE_BYTES, 8 * batch * self.k)
        tiles_a_split = -(-table.tiles // splits)
        splits = -(-table.tiles // tiles_a_split)
        out = torch.empty(batch, self.k, dtype=dtype, device=x.device)
        parts = part_buffer(splits, out)
        constants = {
            "IN": nvrtc.DTYPE_CODES[x.dtype],
            "OUT": nvrtc.DTYPE_CODES[dtype],
            "R": layout.rows,
            "T": layout.tile,
            "WARPS": layout.warps,
            "STAGES": stages,
            "GATHER": int(gathers),
        }
        kernel = nvrtc.kernel("sjlt.cu", "sjlt", _SIGNATURE, constants, x.device)
        kernel.launch(
            (row_groups * splits, table.passes),
            layout.warps * 32,
            shared,
            (
                x.data_ptr(),
                x.stride(0),
                batch,
                self.p,
                0 if self._columns is None else self._columns.data_ptr(),
                table.entries.data_ptr(),
                table.offsets.data_ptr(),
                entry_bytes,
                (out if parts is None else parts).data_ptr(),
                int(parts is None),
                self.scale,
                self.k,
                layout.k_pass,
                layout.copies,
                table.tiles,
                tiles_a_split,
                row_groups,
            ),
        )
        return finish(parts, out, self.scale)

    def _stages(self, sums: int, stage: int, limit: int, gathers: bool) -> tuple[int, int]:
        """Stages and resident blocks a multiprocessor: two small blocks overlap better than one large one."""
        per_processor = limit + _RESERVED
        blocks = self._tuning.blocks
        if blocks is None:
            blocks = 2 if 2 * (sums + (2 if gathers else 3) * stage + 2 * _RESERVED) <= per_processor else 1
        stages = self._tuning.stages
        if stages is None:
            stages = 2 if gathers else max(2, min(4, ((per_processor // blocks - 2 * _RESERVED) - sums) // stage))
        return stages, blocks


def _splits(row_groups: int, tiles: int, slots: int, tile_bytes: int, part_bytes: int) -> tuple[int, float]:
    """Into how many runs of tiles the columns are split, and the estimated cost in bytes moved.

    Whole waves of thread blocks fill the device; each block costs about six tiles to start and end, and each split
    writes and reads one more set of partial sums.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, max(1, min(tiles, 4 * slots // row_groups)) + 1):
        waves = -(-row_groups * splits // slots)
        cost = float(waves * slots * (-(-tiles // splits) + 6) * tile_bytes)
        if splits > 1:
            cost += float(splits * part_bytes)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best, best_cost
