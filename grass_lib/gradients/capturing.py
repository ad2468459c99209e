"""Recording what a function does on a GPU as a CUDA graph, such that a failure leaves PyTorch as it was."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from grass_lib.errors import GrassError

Replay = Callable[[], None]
_WAITS = "called a synchronizing CUDA operation"


class CapturedGraphs:
    """CUDA graphs that are never replayed at the same time and therefore share their memory.

    The memory goes back to PyTorch with the last of the graphs.
    """

    def __init__(self, device: torch.device) -> None:
        """Takes the device; nothing is done yet."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def __call__(self, step: Callable[[], None]) -> Replay:
        """Records a step without running it.

        Args:
            step: Has run before, so that kernels are compiled and algorithms chosen. It reads and writes tensors that
                stay where they are, and does not wait for the device.

        Returns:
            Does on the current stream what the step does.

        Raises:
            GrassError: The step cannot be recorded; the message says why.
        """
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            # Graphs of others that wait to be collected must not be destroyed while this one is captured.
            gc.collect()
            # Memory of eager passes that is cached is memory that the graph cannot have.
            torch.cuda.empty_cache()
            _clear_workspaces()
            try:
                graph = self._capture(step)
            finally:
                _clear_workspaces()
        self._graphs.append(graph)
        return graph.replay

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._stream is None:
            # What a step does beside its main line takes what that leaves free.
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else torch.cuda.graph_pool_handle()
        index = torch.cuda.current_device()
        random = torch.cuda.default_generators[index].get_state()
        with torch.cuda.stream(self._stream):
            try:
                # Other threads, such as one that pins memory for a loader, go on meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                step()
            except Exception as error:  # noqa: BLE001 - whatever it is, the capture has to end; it is raised below
                failure: Exception | None = error
            else:
                failure = None
            try:
                with warnings.catch_warnings():
                    if failure is not None:
                        warnings.simplefilter("ignore")  # that nothing was recorded is no news then
                    graph.capture_end()
            except RuntimeError as error:
                _tidy(graph, pool, index, random)
                failure = failure or error
            else:
                if failure is not None:
                    # Its traceback keeps the graph alive, which must not be destroyed in the middle of another capture.
                    graph.reset()
        if failure is not None:
            first_line = (str(failure).splitlines() or [""])[0]
            raise GrassError(f"{type(failure).__name__}: {first_line}") from failure
        return graph


def _tidy(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], index: int, random: torch.Tensor) -> None:
    """After a capture that CUDA gave up: PyTorch still sends allocations to its pool and has its generator record."""
    graph.reset()
    with suppress(RuntimeError):  # the first raises where the graph had let go of its pool by itself
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    try:
        torch.rand(1, device=f"cuda:{index}")
    except RuntimeError:
        fresh = torch.Generator(f"cuda:{index}")
        fresh.set_state(random)
        generator.graphsafe_set_state(fresh)
    else:
        generator.set_state(random)


def _clear_workspaces() -> None:
    """Matrix products get their scratch memory anew.

    What is handed out during a capture lies in the graph's memory and must not outlive it; what was handed out before
    might be freed while the graph still uses it.
    """
    torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def noticing_waits() -> Iterator[list[str]]:
    """Notes the operations that make the host wait for the GPU, which no graph can hold.

    Yields:
        Where they were called, filled when the block is left.
    """
    places: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in seen:
        if _WAITS in str(one.message):
            places.append(f"{one.filename}:{one.lineno}")
        elif "ynchronization debug mode" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
