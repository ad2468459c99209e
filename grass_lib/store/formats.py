"""How a row is stored: as floats, or as one-byte codes with a scale for each block of 128 features.

| dtype | bytes per feature | largest error of a value |
| --- | --- | --- |
| ``float32`` | 4 | none |
| ``bfloat16`` | 2 | 1/256 of the value |
| ``float16`` | 2 | 1/2048 of the value; nothing above 65504 |
| ``int8`` | 1 + 2/128 | half a scale: 1/252 of the largest value of its block |
| ``fp8`` | 1 + 2/128 | 1/16 of the value, or 1/450,000 of the largest value of its block where that is more |

Scales are bfloat16, which has the range of float32, rounded up so that no code overflows; codes are computed with the
rounded scale, so that its own rounding costs nothing but a little of the codes' range. Everything is plain float32
arithmetic, correctly rounded, hence the same bits on every device.

A block with a value that is not finite has the scale NaN, and is NaN when it is decoded: it never becomes a number. A
block whose largest value is too small for a normal scale (less than about 2e-36) becomes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""Names as users type them, and the type of the stored numbers."""
SCALED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Types of codes, and the largest code."""
SCALE_BLOCK = 128
"""Features that share a scale; the last block of a row may have fewer."""
SCALE_DTYPE = torch.bfloat16
_TINY = torch.finfo(SCALE_DTYPE).tiny
_NAN_BITS = 0x7FC0
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Rows:
    """Rows of one layer as they are stored.

    Attributes:
        codes: ``(n, k_l)``: the values themselves, or one-byte codes.
        scales: ``(n, ceil(k_l / 128))`` bfloat16 for codes; None for values.
    """

    codes: Tensor
    scales: Tensor | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """``(n, k_l)``."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def tensors(self) -> list[Tensor]:
        """Codes, and scales where there are some."""
        return [self.codes] if self.scales is None else [self.codes, self.scales]

    def part(self, rows: slice) -> Rows:
        """Some of the rows, in the same memory."""
        return Rows(self.codes[rows], None if self.scales is None else self.scales[rows])

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        return Rows(self.codes.to(device), None if self.scales is None else self.scales.to(device))

    def decoded(self) -> Tensor:
        """``(n, k_l)``: values as they are, codes times their scales in float32."""
        if self.scales is None:
            return self.codes
        result, scales = _as_float32(self.codes), self.scales.float()
        whole = result.shape[1] // SCALE_BLOCK
        if whole:
            result[:, : whole * SCALE_BLOCK].unflatten(1, (whole, SCALE_BLOCK)).mul_(scales[:, :whole, None])
        result[:, whole * SCALE_BLOCK :].mul_(scales[:, whole:])
        return result


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The type of stored numbers, from its name or itself.

    Raises:
        UsageError: No store has it.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise UsageError(f"dtype is {dtype!s}, which no gradient store has; expected one of {', '.join(DTYPES)}")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a type of stored numbers."""
    return next(name for name, found in DTYPES.items() if found == dtype)


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of rows before they are stored and when they are read: float32 where codes are stored."""
    return torch.float32 if dtype in SCALED else dtype


def scale_count(k: int) -> int:
    """Scales of a row of ``k`` features."""
    return -(-k // SCALE_BLOCK)


def row_bytes(k: int, dtype: torch.dtype) -> int:
    """Bytes of a row of ``k`` features in a shard, scales included."""
    return k * dtype.itemsize + (scale_count(k) * SCALE_DTYPE.itemsize if dtype in SCALED else 0)


def empty_rows(n: int, k: int, dtype: torch.dtype, *, pin_memory: bool = False) -> Rows:
    """Memory for ``(n, k)`` stored rows on the CPU."""
    codes = torch.empty(n, k, dtype=dtype, pin_memory=pin_memory)
    if dtype not in SCALED:
        return Rows(codes)
    return Rows(codes, torch.empty(n, scale_count(k), dtype=SCALE_DTYPE, pin_memory=pin_memory))


def encode(rows: Tensor, dtype: torch.dtype) -> Rows:
    """Rounds rows to a type of stored numbers, where they are.

    Args:
        rows: ``(n, k_l)``, floating.
        dtype: One of `DTYPES`.

    Returns:
        Rows of this type; see above for values that are not finite or very small.
    """
    if dtype not in SCALED:
        return Rows(rows.to(dtype))
    values = rows.float()
    n, k = values.shape
    whole, largest = k // SCALE_BLOCK, SCALED[dtype]
    top = values.new_empty(n, scale_count(k))
    if whole:
        blocks = values[:, : whole * SCALE_BLOCK].unflatten(1, (whole, SCALE_BLOCK))
        torch.amax(blocks.abs(), dim=2, out=top[:, :whole])
    if k % SCALE_BLOCK:
        torch.amax(values[:, whole * SCALE_BLOCK :].abs(), dim=1, out=top[:, whole])
    # A GPU divides by a number by multiplying with its inverse, a CPU does not: this is one product on both.
    scales = _rounded_up(top * (1.0 / largest), _FLOAT32_MAX / largest)
    wide = scales.float().repeat_interleave(SCALE_BLOCK, dim=1)[:, :k]
    codes = (values / wide).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    if dtype == torch.int8:
        codes.round_()
    return Rows(codes.clamp_(-largest, largest).to(dtype), scales)


def _as_float32(codes: Tensor) -> Tensor:
    """Codes as numbers."""
    if codes.dtype == torch.int8 or codes.device.type != "cpu":
        return codes.float()
    # PyTorch converts fp8 one by one on a CPU. Its bits, moved to their places in a float16, are the number over 256.
    bits = codes.view(torch.int8).to(torch.int16)
    moved = (bits << 7).bitwise_and_(0x3F80).bitwise_or_(bits.bitwise_and_(-0x8000))
    return moved.view(torch.float16).float().mul_(256.0)


def _rounded_up(exact: Tensor, most: float) -> Tensor:
    """Scales as bfloat16 that are not below the exact ones; 0 below normal numbers, NaN where not finite."""
    bits = exact.clone().view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
    scales = bits.view(torch.float32)
    # The largest code times the scale has to be finite: within 1 % of the largest float32, scales are rounded down.
    scales = torch.where(scales > most, exact.view(torch.int32).bitwise_and(-0x10000).view(torch.float32), scales)
    scales = torch.where(exact < _TINY, torch.zeros_like(scales), scales)
    bits = scales.to(SCALE_DTYPE).view(torch.int16)
    # A number that is none has many bit patterns; this one, on every device.
    return torch.where(exact.isfinite(), bits, torch.full_like(bits, _NAN_BITS)).view(SCALE_DTYPE)
