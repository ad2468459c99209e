"""Independent pieces of a GPU's work side by side, where one alone would leave most of it idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def on_streams(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device, at_once: int
) -> Iterator[Result]:
    """Results of independent pieces in their order; on a GPU several at a time, each on a thread and stream of its own.

    Results are finished when they are given, and stay valid on the current stream. On other devices one piece follows
    the other.

    Args:
        work: Gives the result of a piece; must not change what another one reads.
        pieces: What it is called with.
        device: Where it computes.
        at_once: How many at a time.

    Yields:
        One result after the other. The first exception of a piece is raised in its place, and pieces that have not
        begun are left out.
    """
    if device.type != "cuda" or min(at_once, len(pieces)) < 2:
        yield from map(work, pieces)
        return
    current = torch.cuda.current_stream(device)
    # PyTorch loads its linear algebra at first use, and several threads must not do that at the same time (its #90613).
    torch.linalg.eigh(torch.ones(1, 1, device=device))
    current.synchronize()
    free = [torch.cuda.Stream(device) for _ in range(at_once)]

    def run(piece: Piece) -> Result:
        stream = free.pop()
        try:
            with torch.cuda.stream(stream):
                return work(piece)
        finally:
            stream.synchronize()
            free.append(stream)

    with ThreadPoolExecutor(at_once) as pool:
        # As many as run: results wait for nobody, and an exception finds little that would have to be dropped.
        waiting: list[Future[Result]] = []
        rest = iter(pieces)
        try:
            for piece in rest:
                waiting.append(pool.submit(run, piece))
                if len(waiting) > at_once:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
