"""The SJLT on the GPU, and the same kernel over kept coordinates only (`grass`); the reference is `projection.sjlt`."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc
from grass_lib.kernels.launch import finish, flat_rows, part_buffer
from grass_lib.kernels.sjlt_table import Layout, Table, build_table

_SIGNATURE = "PlilPPPiPifiiiiii"
_TILE_BYTES = (65536, 32768, 16384, 8192)  # of one stage, the first that fits: large ones wait less at barriers
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


@dataclass(frozen=True)
class _Plan:
    """A launch for one batch size and one pair of types; its tables live as long as the kernel object."""

    kernel: nvrtc.Kernel
    grid: tuple[int, int]
    threads: int
    shared: int
    splits: int
    tables: tuple[int, ...]
    sizes: tuple[int | float, ...]


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
        self._plans: dict[tuple[int, torch.dtype, torch.dtype], _Plan] = {}

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
        # With more than one row, half of the shared memory and more is better spent on long tiles.
        room = limit * (4 if rows > 1 else 6) // 10
        copies = 1
        while self.k * copies * 2 <= 1024:
            copies *= 2
        k_pass = min(self.k, (room // (4 * rows) - 64) // copies)
        passes = -(-self.k // k_pass)
        k_pass = -(-self.k // passes)
        layout = Layout(rows, 64, self._tuning.warps, k_pass, copies)
        wanted = (self._tuning.tile,) if self._tuning.tile else tuple(size // (rows * width) for size in _TILE_BYTES)
        for tile in wanted:
            fitting = replace(layout, tile=tile)
            sums = layout.sum_rows * rows * 4
            if sums + 2 * self._stage_bytes(fitting, width, None) <= limit and tile < 4 * max(self.p, 64):
                return fitting
        return layout

    def _stage_bytes(self, layout: Layout, width: int, longest: int | None) -> int:
        """Bytes of one stage: the tile's rows and its entries (estimated until the table is packed)."""
        if longest is None:
            mean = layout.tile * self.c / layout.groups
            longest = int(0.55 * mean + 1.5 * mean**0.5 + 3)
        pitch = layout.tile * width + 4 * max(4, layout.lanes)
        return layout.rows * pitch + longest * layout.groups * 8

    def _cost(self, layout: Layout, batch: int, width: int) -> float:
        row_groups = -(-batch // layout.rows)
        tiles = -(-self.p // layout.tile)
        slots = nvrtc.processors(self.device)
        _, cost = _splits(row_groups, tiles, slots, layout.rows * layout.tile * width, 8 * batch * self.k)
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
        key = (batch, x.dtype, dtype)
        # Planning costs more than many a launch: one call for each of hundreds of layers is a common use.
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(*key)
        out = torch.empty(batch, self.k, dtype=dtype, device=x.device)
        parts = part_buffer(plan.splits, out)
        result = (out if parts is None else parts).data_ptr()
        plan.kernel.launch(
            plan.grid,
            plan.threads,
            plan.shared,
            (x.data_ptr(), x.stride(0), *plan.tables, result, int(parts is None), *plan.sizes),
        )
        return finish(parts, out, self.scale)

    def _plan(self, batch: int, dtype: torch.dtype, out_dtype: torch.dtype) -> _Plan:
        width = dtype.itemsize
        layout = self.layout(batch, width)
        table = self.table(layout)
        gathers = self._columns is not None
        tile_width = 4 if gathers else width
        entry_bytes = table.longest * layout.groups * 8
        sums = layout.sum_rows * layout.rows * 4
        stage = self._stage_bytes(layout, tile_width, table.longest)
        limit = nvrtc.shared_memory(self.device) - _RESERVED
        stages, resident = self._stages(sums, stage, limit, gathers)
        row_groups = -(-batch // layout.rows)
        slots = nvrtc.processors(self.device) * resident
        splits, _ = _splits(
            row_groups * table.passes, table.tiles, slots, layout.rows * layout.tile * tile_width, 8 * batch * self.k
        )
        tiles_a_split = -(-table.tiles // splits)
        splits = -(-table.tiles // tiles_a_split)
        bulk = not gathers and torch.cuda.get_device_capability(self.device)[0] >= 9  # one more warp only copies
        constants = {
            "IN": nvrtc.DTYPE_CODES[dtype],
            "OUT": nvrtc.DTYPE_CODES[out_dtype],
            "R": layout.rows,
            "T": layout.tile,
            "WARPS": layout.warps,
            "STAGES": stages,
            "GATHER": int(gathers),
        }
        columns = 0 if self._columns is None else self._columns.data_ptr()
        return _Plan(
            kernel=nvrtc.kernel("sjlt.cu", "sjlt", _SIGNATURE, constants, self.device),
            grid=(row_groups * splits, table.passes),
            threads=layout.warps * 32 + (32 if bulk else 0),
            shared=sums + stages * stage,
            splits=splits,
            tables=(batch, self.p, columns, table.entries.data_ptr(), table.offsets.data_ptr(), entry_bytes),
            sizes=(self.scale, self.k, layout.k_pass, layout.copies, table.tiles, tiles_a_split, row_groups),
        )

    def _stages(self, sums: int, stage: int, limit: int, gathers: bool) -> tuple[int, int]:
        """Stages, and blocks that a multiprocessor holds at a time."""
        if self._tuning.stages is not None:
            return self._tuning.stages, self._tuning.blocks or 1
        stages = 2 if gathers else max(2, min(4, (limit - sums) // stage))
        return stages, self._tuning.blocks or max(1, min(2, limit // (sums + stages * stage + _RESERVED)))


def _splits(row_groups: int, tiles: int, slots: int, tile_bytes: int, part_bytes: int) -> tuple[int, float]:
    """Into how many runs of tiles the columns are split, and the estimated cost in bytes moved.

    Whole waves of thread blocks fill the device; each block costs about 64 KB of reading to start and end, and each
    split writes and reads one more set of partial sums.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, max(1, min(tiles, 4 * slots // row_groups)) + 1):
        waves = -(-row_groups * splits // slots)
        cost = float(waves * slots * (-(-tiles // splits) * tile_bytes + 65536))
        if splits > 1:
            cost += float(splits * part_bytes)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best, best_cost
