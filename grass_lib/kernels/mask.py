"""Keeping coordinates on the GPU; the reference is `projection.mask`."""

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc
from grass_lib.kernels.launch import flat_rows


class GatherKernel:
    """Copies kept columns, scaled.

    Args:
        columns: ``(k,)`` int64 columns on the GPU, ascending for speed.
        scale: Factor on every value.
    """

    def __init__(self, columns: Tensor, scale: float) -> None:
        self._columns = columns.contiguous()
        self.k = columns.numel()
        self.scale = scale

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Takes the kept columns of ``(n, p)`` as ``(n, k)`` of type ``dtype``."""
        x = flat_rows(x)
        out = torch.empty(x.shape[0], self.k, dtype=dtype, device=x.device)
        if out.numel() == 0:
            return out
        constants = {"IN": nvrtc.DTYPE_CODES[x.dtype], "OUT": nvrtc.DTYPE_CODES[dtype]}
        kernel = nvrtc.kernel("gather.cu", "gather", "PliPlfP", constants, x.device)
        wide = -(-self.k // 256)
        high = min(x.shape[0], 65535, max(1, 16 * nvrtc.processors(x.device) // wide))
        kernel.launch(
            (wide, high),
            256,
            0,
            (
                x.data_ptr(),
                x.stride(0),
                x.shape[0],
                self._columns.data_ptr(),
                self.k,
                self.scale,
                out.data_ptr(),
            ),
        )
        return out
