"""The blocked Hadamard transform with subsampling (`fjlt`) on the GPU; the reference is `projection.fjlt`."""

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.kernels import nvrtc
from grass_lib.kernels.launch import finish, flat_rows, part_buffer

_SIGNATURE = "PlilPPPifiiiii"
_FOLD_LIMIT = 15  # 2^15 fp32 values fill the shared memory of a block; larger blocks are folded
LARGEST_BITS = 16  # larger ones would be folded too often to be worth it


class FjltKernel:
    """A fixed blocked Hadamard transform on one GPU.

    Args:
        negative: ``(blocks * 2^m,)`` bool on the GPU, True where the random sign is -1.
        picked: ``(blocks, k)`` integers in ``[0, 2^m)``: which transformed value of a block each output takes.
        picked_negative: ``(blocks, k)`` bool, True where it is taken with a minus.
        p: Input dimension.
        scale: Factor on every output, ``1 / sqrt(k)`` for the transform with entries +-1.

    Raises:
        UsageError: Blocks are larger than 65,536.
    """

    def __init__(self, negative: Tensor, picked: Tensor, picked_negative: Tensor, p: int, scale: float) -> None:
        self.blocks, self.k = picked.shape
        size = negative.numel() // self.blocks
        self.bits = size.bit_length() - 1
        if self.bits > LARGEST_BITS:
            raise UsageError(
                f'backend="kernel" transforms blocks of up to {1 << LARGEST_BITS} values, k = {self.k} needs {size}; '
                'use backend="torch"'
            )
        self.p = p
        self.scale = scale
        self._signs = pack_bits(negative)
        self._picked = _with_signs(picked, picked_negative, 16 if self.bits < 16 else 32)

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Projects ``(n, p)`` to ``(n, k)`` of type ``dtype``."""
        x = flat_rows(x)
        batch = x.shape[0]
        out = torch.empty(batch, self.k, dtype=dtype, device=x.device)
        if batch == 0:
            return out
        full = self.bits
        bits = min(full, _FOLD_LIMIT)
        tile = max(bits, 12) if full <= _FOLD_LIMIT else bits
        rows = 1 if batch == 1 or bits > 12 else 2
        widths = pass_widths(bits)
        threads = 512 if bits >= 14 else 256
        held = -(-min(self.k, 1 << bits if full == bits else 1 << 15) // threads)
        slices = -(-self.k // (held * threads))
        folds = 1 << (full - bits)
        tiles = -(-self.blocks // (1 << (tile - bits)))
        row_groups = -(-batch // rows)
        resident = max(1, min(4 if bits <= 12 else 2, nvrtc.shared_memory(x.device) // ((4 * rows) << tile)))
        slots = nvrtc.processors(x.device) * resident
        splits = max(1, min(tiles, slots // (row_groups * folds * slices)))
        tiles_a_split = -(-tiles // splits)
        splits = -(-tiles // tiles_a_split)
        parts = part_buffer(splits * folds, out)
        constants = {
            "IN": nvrtc.DTYPE_CODES[x.dtype],
            "OUT": nvrtc.DTYPE_CODES[dtype],
            "M": bits,
            "FULL": full,
            "S": tile,
            "V": rows,
            "THREADS": threads,
            "SLICE": held,
            **{f"W{i}": width for i, width in enumerate(widths)},
        }
        kernel = nvrtc.kernel("fjlt.cu", "fjlt", _SIGNATURE, constants, x.device)
        kernel.launch(
            (row_groups * splits, folds, slices),
            threads,
            (4 * rows) << tile,
            (
                x.data_ptr(),
                x.stride(0),
                batch,
                self.p,
                self._signs.data_ptr(),
                self._picked.data_ptr(),
                (out if parts is None else parts).data_ptr(),
                int(parts is None),
                self.scale,
                self.k,
                self.blocks,
                tiles,
                tiles_a_split,
                row_groups,
            ),
        )
        return finish(parts, out, self.scale)


def pass_widths(bits: int) -> tuple[int, int, int, int]:
    """Splits a transform over ``bits`` index bits into passes of at most 5 bits (4 up to 12 bits), wide ones first.

    >>> pass_widths(12), pass_widths(13), pass_widths(9)
    ((4, 4, 4, 0), (5, 4, 4, 0), (3, 3, 3, 0))
    """
    passes = max(1, -(-bits // 4)) if bits <= 12 else 3
    widths = [bits // passes + (i < bits % passes) for i in range(passes)]
    widths += [0] * (4 - passes)
    return widths[0], widths[1], widths[2], widths[3]


def pack_bits(flags: Tensor) -> Tensor:
    """Packs ``(n,)`` bool into int32 words, value ``i`` in bit ``i % 32`` of word ``i // 32``."""
    words = []
    for chunk in flags.split(1 << 24):
        padded = torch.nn.functional.pad(chunk, (0, -chunk.numel() % 32)).reshape(-1, 32)
        weights = torch.ones(32, dtype=torch.int64, device=flags.device) << torch.arange(32, device=flags.device)
        word = (padded.to(torch.int64) * weights).sum(1)
        words.append(torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32))
    return torch.cat(words)


def _with_signs(picked: Tensor, negative: Tensor, bits: int) -> Tensor:
    """Rows with their sign in the highest of ``bits`` bits, the two's complement of a lowest negative number."""
    lowest = -(1 << (bits - 1))
    parts = []
    for rows, minus in zip(picked.split(1 << 12), negative.split(1 << 12), strict=True):
        values = rows.to(torch.int64) + minus.to(torch.int64) * lowest
        parts.append(values.to(torch.int16 if bits == 16 else torch.int32))
    return torch.cat(parts)
