"""Recording on a CPU with stand-ins for the CUDA calls: what is done when a capture fails, and what is not."""

import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch

from grass_lib.errors import GrassError
from grass_lib.gradients.capturing import CapturedGraphs, noticing_waits


class Cuda:
    """Notes the calls; `ends` is raised when a capture ends, `poisoned` makes the generator refuse."""

    def __init__(self, monkeypatch, ends=None, poisoned=False, let_go=False):
        self.calls, self.ends, self.poisoned, self.let_go = [], ends, poisoned, let_go
        cuda = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                cuda.calls.append(("begin", pool, capture_error_mode))

            def capture_end(self):
                cuda.calls.append("end")
                if cuda.ends is not None:
                    raise cuda.ends

            def pool(self):
                return (7, 0)

            def reset(self):
                cuda.calls.append("reset")

            def replay(self):
                cuda.calls.append("replay")

        class Generator:
            def get_state(self):
                return torch.zeros(16, dtype=torch.uint8)

            def set_state(self, state):
                cuda.calls.append("set_state")

            def graphsafe_set_state(self, other):
                cuda.calls.append("new generator")

        @contextmanager
        def stream(_):
            cuda.calls.append("stream")
            try:
                yield
            finally:
                cuda.calls.append("stream back")

        def end_pool(index, pool):
            cuda.calls.append(("end pool", index, pool))
            if cuda.let_go:
                raise RuntimeError("not recording to this pool")

        def rand(*_, **__):
            if cuda.poisoned:
                raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

        self.mode = 0
        replaced = {
            "CUDAGraph": Graph,
            "Stream": lambda device, priority=0: "side",
            "stream": stream,
            "device": lambda device: nullcontext(),
            "synchronize": lambda: cuda.calls.append("synchronize"),
            "empty_cache": lambda: None,
            "graph_pool_handle": lambda: (0, 1),
            "current_device": lambda: 0,
            "default_generators": (Generator(),),
            "get_sync_debug_mode": lambda: cuda.mode,
            "set_sync_debug_mode": lambda mode: setattr(cuda, "mode", mode),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "rand", rand)
        monkeypatch.setattr(torch, "Generator", lambda device: Generator())
        private = {
            "_cuda_clearCublasWorkspaces": lambda: cuda.calls.append("clear"),
            "_cuda_endAllocateToPool": end_pool,
            "_cuda_releasePool": lambda index, pool: cuda.calls.append(("release pool", index, pool)),
        }
        for name, value in private.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)


DEVICE = torch.device("cuda", 0)


def test_a_step_is_recorded_and_the_next_one_shares_its_memory(monkeypatch):
    cuda = Cuda(monkeypatch)
    graphs = CapturedGraphs(DEVICE)
    replay = graphs(lambda: cuda.calls.append("step"))
    begin = ("begin", (0, 1), "thread_local")
    assert cuda.calls == ["synchronize", "clear", "stream", begin, "step", "end", "stream back", "clear"]
    replay()
    assert cuda.calls[-1] == "replay"
    graphs(lambda: None)
    assert ("begin", (7, 0), "thread_local") in cuda.calls


def test_an_error_of_the_step_ends_the_capture(monkeypatch):
    cuda = Cuda(monkeypatch)
    with pytest.raises(GrassError, match="ZeroDivisionError: division by zero") as caught:
        CapturedGraphs(DEVICE)(lambda: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert cuda.calls[-4:] == ["end", "reset", "stream back", "clear"]


@pytest.mark.parametrize("poisoned", [True, False])
@pytest.mark.parametrize("let_go", [True, False])
def test_a_capture_that_cuda_gave_up_is_tidied_up(monkeypatch, poisoned, let_go):
    cuda = Cuda(monkeypatch, ends=RuntimeError("capture invalidated\nmore"), poisoned=poisoned, let_go=let_go)
    with pytest.raises(GrassError, match=r"^RuntimeError: capture invalidated$"):
        CapturedGraphs(DEVICE)(lambda: None)
    released = [] if let_go else [("release pool", 0, (0, 1))]
    numbers = ["set_state", "new generator"] if poisoned else ["set_state"]
    after = cuda.calls[cuda.calls.index("reset") :]
    assert after == ["reset", ("end pool", 0, (0, 1)), *released, *numbers, "stream back", "clear"]


def test_waits_are_noted_and_other_warnings_pass(monkeypatch):
    cuda = Cuda(monkeypatch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with noticing_waits() as waits:
            assert cuda.mode == "warn"
            warnings.warn("called a synchronizing CUDA operation (somewhere)", stacklevel=1)
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
    assert [str(one.message) for one in seen] == ["something else"]
    assert cuda.mode == 0
    assert len(waits) == 1
    assert "test_capturing.py:" in waits[0]
    with pytest.raises(ArithmeticError), noticing_waits():
        raise ArithmeticError
    assert cuda.mode == 0
