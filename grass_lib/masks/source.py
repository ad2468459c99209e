"""Rows of per-sample gradients that can be walked more than once, as every method reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from grass_lib.devices import usable_device
from grass_lib.errors import UsageError
from grass_lib.gradients.full import PerSampleGradients, batch_size, batch_slice, batch_to
from grass_lib.gradients.order import check_order
from grass_lib.gradients.outputs import Batch
from grass_lib.gradients.state import ModelState
from grass_lib.gradients.stream import sample_count

_SHOWN = 8
# Bytes of the float32 rows that a model's gradients are computed into at once.
_BLOCK_BYTES = 256 * 2**20


class GradientSource:
    """Per-sample gradients as blocks of rows, the same in every walk.

    Attributes:
        n: Number of rows.
        p: Length of a row.
        device: Where the blocks lie.
        rows: The matrix ``(n, p)`` itself where it is in memory anyway, else None.
    """

    def __init__(
        self,
        walk: Callable[[], Iterator[Tensor]],
        n: int,
        p: int,
        device: torch.device | str = "cpu",
        rows: Tensor | None = None,
    ) -> None:
        """Wraps a function.

        Args:
            walk: Called for every walk; yields float blocks ``(batch, p)``, in the same order each time. A block may be
                overwritten once the next one is asked for.
            n: Number of rows.
            p: Length of a row.
            device: Where the blocks lie.
            rows: The matrix itself, where it is in memory.
        """
        self._walk = walk
        self.n, self.p, self.device, self.rows = n, p, usable_device(device), rows

    @classmethod
    def from_tensor(cls, rows: Tensor, *, block: int = 256) -> GradientSource:
        """A source over a matrix in memory, which is used where it lies.

        Args:
            rows: ``(n, p)``, floating.
            block: Rows in a block.

        Raises:
            UsageError: It is no floating matrix, or ``block`` is below 1.
        """
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.dtype.is_floating_point:
            seen = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise UsageError(f"gradients are {seen}; expected a floating tensor (n, p)")
        if block < 1:
            raise UsageError(f"block is {block}; expected at least 1 row")
        rows = rows.detach()
        return cls(lambda: iter(rows.split(block)), len(rows), rows.shape[1], rows.device, rows)

    @classmethod
    def from_model(
        cls,
        gradients: PerSampleGradients,
        loader: Iterable[Batch],
        state: ModelState | Mapping[str, Tensor] | None = None,
        *,
        n: int | None = None,
    ) -> GradientSource:
        """A source that computes the gradients anew in every walk and holds at most 256 MiB of them.

        Args:
            gradients: Computes the rows.
            loader: Yields batches, the same in every walk (no shuffling).
            state: The checkpoint; None for the model's present weights.
            n: Samples that the loader yields; None counts them, by walking the loader where its length does not say.

        Raises:
            UsageError: The checkpoint or a batch does not fit, or the loader shuffles.
        """
        check_order(loader)
        bound = state if isinstance(state, ModelState) else gradients.bind(state)
        count = sample_count(loader) if n is None else n
        if count is None:
            count = sum(batch_size(batch_to(batch, torch.device("cpu"))) for batch in loader)
        most = max(1, _BLOCK_BYTES // (gradients.p * gradients.dtype.itemsize))

        def walk() -> Iterator[Tensor]:
            seen = 0
            for batch in loader:
                samples = batch_to(batch, gradients.device)
                size = batch_size(samples)
                for start in range(0, size, most):
                    piece = batch_slice(samples, start, min(start + most, size))
                    yield gradients(bound, piece, first=seen)[0]
                    seen += batch_size(piece)

        return cls(walk, count, gradients.p, gradients.device)

    def __iter__(self) -> Iterator[Tensor]:
        """Blocks ``(batch, p)`` in the source's dtype.

        Raises:
            UsageError: A block has another width, a row is not finite, or there are more or fewer than n rows.
        """
        seen = 0
        for block in self._walk():
            if block.dim() != 2 or block.shape[1] != self.p:
                raise UsageError(f"a block of gradients is {tuple(block.shape)}; expected (batch, {self.p})")
            _check_finite(block, seen)
            seen += len(block)
            yield block
        if seen != self.n:
            raise UsageError(
                f"a walk over the gradients gave {seen} rows, and {self.n} were announced; the source must give the "
                "same rows every time"
            )

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Rows in chunks of one size, whatever the blocks, so that sums round in the same way for every block size.

        Args:
            size: Rows in a chunk; the last one takes what is left.

        Yields:
            The number of the first row, and float32 ``(rows, p)`` that is overwritten by the next chunk.
        """
        held = torch.empty(min(size, self.n), self.p, device=self.device)
        filled = done = 0
        for block in self:
            start = 0
            while start < len(block):
                count = min(len(held) - filled, len(block) - start)
                held[filled : filled + count] = block[start : start + count]
                start, filled = start + count, filled + count
                if filled == len(held):
                    yield done, held
                    done, filled = done + filled, 0
        if filled:
            yield done, held[:filled]


def as_source(gradients: GradientSource | Tensor) -> GradientSource:
    """The source itself, or one over a matrix.

    Raises:
        UsageError: It is neither.
    """
    return gradients if isinstance(gradients, GradientSource) else GradientSource.from_tensor(gradients)


def check_request(source: GradientSource, k: int, queries: GradientSource | None = None) -> None:
    """Checks what every method needs.

    Raises:
        UsageError: k is not from 1 to p, there are fewer than two rows, or the queries have another length.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= source.p:
        raise UsageError(f"k is {k!r}; expected 1 to p = {source.p} coordinates")
    if source.n < 2:
        raise UsageError(f"there are {source.n} gradients; expected those of at least 2 samples")
    if queries is not None and queries.p != source.p:
        raise UsageError(f"the queries have p={queries.p} and the gradients p={source.p}; expected the same model")


def check_nonzero(energy: Tensor) -> None:
    """Raises UsageError where all second moments ``(p,)`` are 0."""
    if not bool((energy > 0).any()):
        raise UsageError(
            "all gradients are zero: no coordinate is better than another; look at the loss, the checkpoint and the "
            "weights that require gradients"
        )


def _check_finite(block: Tensor, first: int) -> None:
    if bool(torch.isfinite(block.sum(dim=1, dtype=torch.float64)).all()):
        return
    bad = torch.nonzero(~torch.isfinite(block).all(dim=1)).flatten()
    if len(bad) == 0:
        return
    shown = ", ".join(str(first + int(row)) for row in bad[:_SHOWN])
    more = f" and {len(bad) - _SHOWN} more of this block" if len(bad) > _SHOWN else ""
    raise UsageError(
        f"the gradients of row(s) {shown}{more} hold NaN or infinity; leave these samples out, or use an output that "
        "stays finite, such as grass_lib.gradients.margin"
    )
