"""What all kernels share around a launch: rows with unit stride, partial sums and their fixed-order end."""

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.kernels import nvrtc


def flat_rows(x: Tensor) -> Tensor:
    """Returns ``(n, p)`` with unit stride inside a row; copies only where the layout asks for it.

    Raises:
        UsageError: ``x`` is no CUDA tensor of fp32, fp16 or bf16.
    """
    if x.device.type != "cuda":
        raise UsageError(f'backend="kernel" needs a tensor on a CUDA GPU, got one on {x.device}; use backend="torch"')
    if x.dtype not in nvrtc.DTYPE_CODES:
        raise UsageError(f'backend="kernel" takes float32, float16 and bfloat16, got {x.dtype}; use backend="torch"')
    if (x.shape[0] > 1 and x.stride(0) < 0) or (x.shape[1] > 1 and x.stride(1) != 1):
        return x.contiguous()
    return x


def part_buffer(splits: int, out: Tensor) -> Tensor | None:
    """An ``(splits, n, k)`` fp32 buffer for partial sums, or None where one part is the result itself."""
    if splits == 1:
        return None
    return torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)


def finish(parts: Tensor | None, out: Tensor, scale: float) -> Tensor:
    """Adds partial sums into ``out`` in ascending order and scales; returns ``out``."""
    if parts is None:
        return out
    code = nvrtc.DTYPE_CODES[out.dtype]
    reduce = nvrtc.kernel("reduce.cu", "reduce_parts", "PilfP", {"IN": 0, "OUT": code}, out.device)
    n = out.numel()
    reduce.launch((-(-n // 256),), 256, 0, (parts.data_ptr(), parts.shape[0], n, scale, out.data_ptr()))
    return out
