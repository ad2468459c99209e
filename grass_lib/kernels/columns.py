"""Kept columns of a layer's inputs and output gradients, on a GPU without reading the tensor once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grass_lib.errors import GrassError
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
        return _plain(x, index, ones)
    # As a matrix, which the layer makes of it too: a compiler sees one tensor and writes it once.
    return _columns(x.flatten(0, -2), index, ones).unflatten(0, x.shape[:-1])


class ColumnsMoved(GrassError):
    """Columns are copied from a tensor that nothing guards: a compiler moved it, or nobody waits for the copy."""


def columns_beside(
    x: Tensor, index: Tensor, ones: bool = False, *, last: bool = False, held: Sequence[Tensor] = ()
) -> Tensor:
    """`kept_columns` of a matrix on a stream of its own, beside what is done with the matrix meanwhile.

    For compiled passes that are being recorded inside `beside`; anywhere else it is `kept_columns`. It does not wait
    for the copy, the next call does. Until then the memory of ``x`` and of the result must stay what it is, and a
    compiler that knows nothing of streams must see to it: the next call takes both in ``held``, so that they live, and
    calls stay in their order. ``x`` has to be a value of its own (see `own_value`): of a view, later values are held.

    Args:
        x: ``(n, d)``.
        index: Kept columns, int64 ``(k,)``, ascending.
        ones: Appends a column of ones.
        last: Copies before anything else happens, as the last call of a forward or backward pass has to.
        held: ``x`` and result of the call before.

    Returns:
        ``(n, k)``, or ``(n, k + 1)`` with ones.

    Raises:
        ColumnsMoved: What is held is not what the call before had.
    """
    return _columns_beside(x, index, ones, last, list(held))


def own_value(x: Tensor) -> Tensor:
    """The same numbers; for a compiler a value of its own, of which a later change of ``x`` in place is no part."""
    return torch.ops.prims.convert_element_type.default(x, x.dtype) if torch.compiler.is_compiling() else x


class _Side:
    """A stream beside the one that is being recorded, and the addresses of what runs there: matrix and result."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._running: list[int] = []

    @property
    def is_here(self) -> bool:
        """Whether the present stream is being recorded: other threads may run passes of their own at the same time."""
        return torch.cuda.is_current_stream_capturing()

    def serves(self, x: Tensor) -> bool:
        """Whether columns of a matrix can be copied here."""
        fits = x.is_cuda and x.device == self.stream.device and x.dtype in _ONE
        return fits and self.is_here and nvrtc.missing_for_kernels() is None

    def run(self, x: Tensor, index: Tensor, ones: bool, out: Tensor) -> None:
        """Copies beside the present stream, once that has come here."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self._running = [x.data_ptr(), out.data_ptr()]
        with torch.cuda.stream(self.stream):
            _launch(x, index, ones, out)

    def join(self, held: Sequence[Tensor]) -> None:
        """The present stream waits for what runs beside it; checks that it was held."""
        if not self._running:
            return
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        running, self._running = self._running, []
        if running != [part.data_ptr() for part in held]:
            raise ColumnsMoved("columns are copied from a tensor that is not held until the copy is done")


_side: _Side | None = None


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Lets `columns_beside` use a stream of its own on a GPU; not for two recordings at the same time."""
    global _side
    before, _side = _side, _Side(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        _side = before


def check_columns() -> None:
    """To be called after a forward or backward pass.

    Raises:
        ColumnsMoved: Columns are still being copied: the last call of the pass was another one than was expected.
    """
    if _side is not None and _side.is_here:
        _side.join(())


def _plain(x: Tensor, index: Tensor, ones: bool = False) -> Tensor:
    """What `kept_columns` gives, in operations of PyTorch."""
    kept = x.index_select(-1, index)
    return torch.cat([kept, kept.new_ones(*kept.shape[:-1], 1)], dim=-1) if ones else kept


# Any strides will do: to get those that it saw, a compiler would write a copy beside what it computes.
@torch.library.custom_op("grass_lib::kept_columns", mutates_args=(), tags=[torch.Tag.flexible_layout])
def _columns(x: Tensor, index: Tensor, ones: bool) -> Tensor:
    if nvrtc.missing_for_kernels() is not None:
        return _plain(x, index, ones)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(len(x), len(index) + ones)
    if out.numel() > 0:
        _launch(x, index, ones, out)
    return out


@_columns.register_fake
def _(x: Tensor, index: Tensor, ones: bool) -> Tensor:
    return x.new_empty(len(x), len(index) + ones)


@torch.library.custom_op("grass_lib::columns_beside", mutates_args=(), tags=[torch.Tag.flexible_layout])
def _columns_beside(x: Tensor, index: Tensor, ones: bool, last: bool, held: list[Tensor]) -> Tensor:
    side = _side
    if side is None or not side.serves(x):
        return kept_columns(x, index, ones)
    side.join(held)
    if last or x.stride(1) != 1 or x.numel() == 0:
        return kept_columns(x, index, ones)
    out = x.new_empty(len(x), len(index) + ones)
    side.run(x, index, ones, out)
    return out


@_columns_beside.register_fake
def _(x: Tensor, index: Tensor, ones: bool, last: bool, held: list[Tensor]) -> Tensor:
    return x.new_empty(len(x), len(index) + ones)


def _launch(x: Tensor, index: Tensor, ones: bool, out: Tensor) -> None:
    """The kernel, on the present stream."""
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
