"""Kept columns of a layer's inputs and output gradients, on a GPU without reading the tensor once more."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc

_THREADS, _ROWS = 256, 16
_ONE = {torch.float32: 0x3F800000, torch.float16: 0x3C00, torch.bfloat16: 0x3F80}


def kept_columns(x: Tensor, index: Tensor, ones: bool = False) -> Tensor:
    """Takes kept columns of the last dimension.

    On a CPU by PyTorch. On a GPU by a kernel that compilers do not look into: they would read scattered columns from
    whatever a tensor is made of, and slow down what makes it. On an H100 two other ways were slower: having the
    compiler send every element to its place in the loop that computes it, and a product with zeros and ones.

    Args:
        x: ``(..., d)``.
        index: Kept columns, int64 ``(k,)``, ascending.
        ones: Appends a column of ones.

    Returns:
        ``(..., k)``, or ``(..., k + 1)`` with ones.
    """
    if not (x.is_cuda and x.dtype in _ONE and x.dim() > 1):
        return plain_columns(x, index, ones)
    # As a matrix, which the layer makes of it too: a compiler sees one tensor and writes it once.
    return _columns(x.flatten(0, -2), index, ones).unflatten(0, x.shape[:-1])


def plain_columns(x: Tensor, index: Tensor, ones: bool = False) -> Tensor:
    """What `kept_columns` gives, in operations of PyTorch, which compilers join with what made the tensor."""
    kept = x.index_select(-1, index)
    return torch.cat([kept, kept.new_ones(*kept.shape[:-1], 1)], dim=-1) if ones else kept


@torch.library.custom_op("grass_lib::kept_columns", mutates_args=())
def _columns(x: Tensor, index: Tensor, ones: bool) -> Tensor:
    if nvrtc.missing_for_kernels() is not None:
        return plain_columns(x, index, ones)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(x), len(index) + ones)
    if out.numel() == 0:
        return out
    constants = {
        "IN": nvrtc.DTYPE_CODES[x.dtype],
        "OUT": nvrtc.DTYPE_CODES[x.dtype],
        "ONES": int(ones),
        "ONE": _ONE[x.dtype],
        "THREADS": _THREADS,
        "ROWS": _ROWS,
    }
    kernel = nvrtc.kernel("columns.cu", "columns", "PliPiP", constants, x.device)
    lines = max(1, _THREADS // out.shape[1])
    kernel.launch(
        (-(-len(x) // (lines * _ROWS)),),
        _THREADS,
        0,
        (x.data_ptr(), x.stride(0), len(x), index.data_ptr(), len(index), out.data_ptr()),
    )
    return out


@_columns.register_fake
def _(x: Tensor, index: Tensor, ones: bool) -> Tensor:
    return x.new_empty(len(x), len(index) + ones)
