"""Kept columns of a layer's inputs and output gradients, on a GPU without reading the tensor once more."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc

_THREADS, _ROWS = 256, 16
_ONE = {torch.float32: 0x3F800000, torch.float16: 0x3C00, torch.bfloat16: 0x3F80}
# Elements that rows are padded to, so that each starts at a multiple of 16 bytes.
_ALIGNED = 8
WAYS = {"kernel": (float("inf"), 0.0), "scatter": (4.0, 0.0), "product": (float("inf"), float("inf"))}
"""`KeptColumns.scatter_from` and `KeptColumns.product_to` that make one way the only one, for measurements."""


def product_is_best(d: int, k: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kept columns are best taken by a product with a matrix of zeros and ones.

    Where many columns are kept, every sector of the memory is read anyhow, and a product reads them at full speed. It
    is exact: tensor cores add zeros to one number. Only for half types on a GPU. On an H100 the kernel was as fast or
    faster at every size (128 of 768 to 14,336 columns, 8.0 against 8.5 and 28.5 against 85.3 microseconds), so that the
    default is never.

    Args:
        d: Columns.
        k: Kept ones.
        dtype: Of the tensors.
        device: Of the tensors.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return half and device.type == "cuda" and k % _ALIGNED == 0 and d <= KeptColumns.product_to * k


class KeptColumns:
    """Takes kept columns of the last dimension.

    On a CPU by PyTorch. On a GPU by a kernel that compilers do not look into: they would read scattered columns from
    whatever a tensor is made of, and slow down what makes it. Two other ways stay for measurements: under a compiler
    every element can be sent to its place, or to one that nobody reads, in the very loop that computes the elements
    (on an H100 the stores cost more than reading again), or a product can take them.

    Attributes:
        index: int64 ``(k,)``, ascending.
        ones: Whether a column of ones is appended.
        scatter_from: Columns per kept one from which elements are sent.
        product_to: Columns per kept one up to which a product is best; see `product_is_best`.
    """

    scatter_from = float("inf")
    product_to = 0.0

    def __init__(self, index: Tensor, d: int, *, ones: bool = False) -> None:
        """Lays out the tables.

        Args:
            index: int64 ``(k,)``, ascending, on the device of the tensors.
            d: Number of columns.
            ones: Appends a column of ones.
        """
        self.index, self.ones = index, ones
        self.places: Tensor | None = None
        if index.is_cuda and d >= self.scatter_from * len(index):
            self.places = torch.full((d,), len(index) + ones, dtype=torch.int64, device=index.device)
            self.places[index] = torch.arange(len(index), device=index.device)

    def __call__(self, x: Tensor) -> Tensor:
        """Takes the columns.

        Args:
            x: ``(..., d)``.

        Returns:
            ``(..., k)``, or ``(..., k + 1)`` with ones. Rows may lie further apart than their length.
        """
        return kept_columns(x, self.index, self.places, self.ones)


def kept_columns(x: Tensor, index: Tensor, places: Tensor | None, ones: bool = False) -> Tensor:
    """As `KeptColumns`, whose tables are given: tensors that a compiler traces must be arguments.

    Args:
        x: ``(..., d)``.
        index: Kept columns, int64 ``(k,)``.
        places: Place of every column in the result, int64 ``(d,)``; None where columns are never sent.
        ones: Appends a column of ones.
    """
    if not (x.is_cuda and x.dtype in _ONE and x.dim() > 1):
        kept = x.index_select(-1, index)
        return torch.cat([kept, kept.new_ones(*kept.shape[:-1], 1)], dim=-1) if ones else kept
    # As a matrix, which the layer makes of it too: a compiler sees one tensor and writes it once.
    rows = x.flatten(0, -2)
    # Where PyTorch must be deterministic it sorts what is sent, which takes many times as long as the kernel.
    sends = torch.compiler.is_compiling() and not torch.are_deterministic_algorithms_enabled()
    if places is not None and sends:
        return scattered_columns(rows, places, len(index), ones).unflatten(0, x.shape[:-1])
    return _columns(rows, index, ones).unflatten(0, x.shape[:-1])


def scattered_columns(rows: Tensor, places: Tensor, kept: int, ones: bool) -> Tensor:
    """Kept columns of a matrix, by sending every element to its place.

    Args:
        rows: ``(n, d)``.
        places: int64 ``(d,)``.
        kept: How many are kept.
        ones: Appends a column of ones.

    Returns:
        ``(n, kept + ones)``, with unit stride in a row.
    """
    k = kept + ones
    out = rows.new_empty(len(rows), k // _ALIGNED * _ALIGNED + _ALIGNED)
    # Unsafe in name only: every place is inside by construction.
    out = torch.ops.aten._unsafe_index_put(out, [None, places], rows)
    if ones:
        out = out.slice_scatter(out.new_ones(len(rows), 1), 1, kept, k)
    return out[:, :k]


@torch.library.custom_op("grass_lib::kept_columns", mutates_args=())
def _columns(x: Tensor, index: Tensor, ones: bool) -> Tensor:
    if nvrtc.missing_for_kernels() is not None:
        kept = x.index_select(1, index)
        return torch.cat([kept, kept.new_ones(len(x), 1)], dim=1) if ones else kept
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
