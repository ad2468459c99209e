"""Dense Gaussian and Rademacher projections on the GPU; the reference is `projection.dense`."""

import importlib
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.kernels import nvrtc
from grass_lib.kernels.launch import finish, flat_rows

_SIGN_COLUMNS, _SIGN_OUTPUTS = 128, 256  # of a step and of a block in rademacher.cu
_NORMAL_COLUMNS, _NORMAL_OUTPUTS = 32, 128  # of a step and of a program in dense_triton.py
_TENSOR_CORE_CAPABILITY = (8, 0)  # bfloat16 products and asynchronous copies


class RademacherKernel:
    """A fixed dense sign projection, CUDA C++ on tensor cores; signs are drawn in registers and never stored.

    fp32 input is scaled by powers of two and cut into two half-precision parts of 11 bits; products with +-1 are
    exact, so the error is that of fp32 sums.

    Args:
        key: The stream's two 32-bit key words.
        p: Input dimension.
        k: Output dimension.
        scale: Factor on every output, ``1 / sqrt(k)``.
        device: The GPU.

    Raises:
        UsageError: The GPU has no bfloat16 tensor cores.
    """

    def __init__(self, key: tuple[int, int], p: int, k: int, scale: float, device: torch.device) -> None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _TENSOR_CORE_CAPABILITY:
            raise UsageError(
                f'backend="kernel" for rademacher needs compute capability 8.0 or later, this GPU has {capability}; '
                'use backend="torch"'
            )
        self._key = key
        self.p = p
        self.k = k
        self.scale = scale

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Projects ``(n, p)`` to ``(n, k)`` of type ``dtype``."""
        x = flat_rows(x)
        batch = x.shape[0]
        out = torch.empty(batch, self.k, dtype=dtype, device=x.device)
        if batch == 0:
            return out
        eighths = min(8, 1 << (-(-batch // 8) - 1).bit_length())
        rows = 8 * eighths
        output_tiles, batch_tiles = -(-self.k // _SIGN_OUTPUTS), -(-batch // rows)
        chunks = -(-self.p // _SIGN_COLUMNS)
        splits, chunks_a_split = even_splits(output_tiles * batch_tiles, chunks, nvrtc.processors(x.device))
        parts = torch.empty(splits, batch, self.k, dtype=torch.float32, device=x.device)
        constants = {"IN": nvrtc.DTYPE_CODES[x.dtype], "OUT": 0, "NT": eighths}
        kernel = nvrtc.kernel("rademacher.cu", "rademacher", "PlilIIPiiii", constants, x.device)
        cuts = 2 if x.dtype == torch.float32 else 1
        shared = 2 * rows * (_SIGN_COLUMNS * x.element_size() + 16 + cuts * (2 * _SIGN_COLUMNS + 64))
        shared += 2 * 2 * 4 * _SIGN_COLUMNS * 4 + 2 * rows * 4
        kernel.launch(
            (output_tiles * batch_tiles, splits),
            256,
            shared,
            (
                x.data_ptr(),
                x.stride(0),
                batch,
                self.p,
                *self._key,
                parts.data_ptr(),
                self.k,
                chunks,
                chunks_a_split,
                output_tiles,
            ),
        )
        return finish(parts, out, self.scale)


class NormalKernel:
    """A fixed dense Gaussian projection in Triton; fp32 accuracy by three tf32 products.

    Args:
        key: The stream's two 32-bit key words.
        p: Input dimension.
        k: Output dimension.
        scale: Factor on every output, ``1 / sqrt(k)``.

    Raises:
        UsageError: Triton is not installed.
    """

    def __init__(self, key: tuple[int, int], p: int, k: int, scale: float) -> None:
        try:
            self._programs: Any = importlib.import_module("grass_lib.kernels.dense_triton")
        except ImportError as error:
            raise UsageError(
                f'backend="kernel" needs Triton for normal ({error}); install it with `pip install triton`, or use '
                'backend="torch"'
            ) from error
        # Triton picks a type by value; as signed 32-bit words all keys have one.
        self._key = tuple(word - (1 << 32) if word >= 1 << 31 else word for word in key)
        self.p = p
        self.k = k
        self.scale = scale

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Projects ``(n, p)`` to ``(n, k)`` of type ``dtype``."""
        x = flat_rows(x)
        batch = x.shape[0]
        out = torch.empty(batch, self.k, dtype=dtype, device=x.device)
        if batch == 0:
            return out
        rows = min(64, max(16, 1 << (batch - 1).bit_length()))
        batch_tiles, output_tiles = -(-batch // rows), -(-self.k // _NORMAL_OUTPUTS)
        chunks = -(-self.p // _NORMAL_COLUMNS)
        splits, chunks_a_split = even_splits(batch_tiles * output_tiles, chunks, 2 * nvrtc.processors(x.device))
        parts = torch.empty(splits, batch, self.k, dtype=torch.float32, device=x.device)
        with torch.cuda.device(x.device):
            self._programs.normal[(batch_tiles * output_tiles, splits)](
                x,
                x.stride(0),
                batch,
                self.p,
                *self._key,
                parts,
                self.k,
                chunks,
                chunks_a_split,
                batch_tiles,
                BP=_NORMAL_COLUMNS,
                BM=rows,
                num_warps=8,
            )
        return finish(parts, out, self.scale)


def even_splits(tiles: int, chunks: int, slots: int) -> tuple[int, int]:
    """Splits ``chunks`` steps of ``tiles`` blocks so that whole waves fill ``slots``.

    Returns:
        The number of splits and the chunks of each.

    >>> even_splits(16, 37500, 132)
    (8, 4688)
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, max(1, min(chunks, 4 * slots // tiles)) + 1):
        cost = -(-tiles * splits // slots) * (-(-chunks // splits) + 4)
        if cost < best_cost:
            best, best_cost = splits, cost
    a_split = -(-chunks // best)
    return -(-chunks // a_split), a_split
