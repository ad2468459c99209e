"""Processes that work together: who does what, what they tell each other, and who went away.

One process per GPU, started by torchrun; without it everything here is the work of one process, at no cost.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grass_lib.errors import GrassError, UsageError

PATIENCE = timedelta(hours=2)
"""How long the first rank waits for the slowest at a meeting; one that was killed is noticed at once."""
_FAILED = re.compile(r"Ranks? ([\d, ]+) failed to pass")
_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes of a torch.distributed group, seen from one of them.

    Attributes:
        rank: This process's number.
        world: How many there are.
        control: Group over the CPU for messages; None for a process alone.
    """

    rank: int = 0
    world: int = 1
    control: Any = None

    @classmethod
    def joined(cls) -> Ranks:
        """The ranks of the group that ``torch.distributed.init_process_group`` made; every rank must call this.

        Raises:
            UsageError: There is no group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                "there is no process group; start the program with torchrun and call "
                "torch.distributed.init_process_group() first, or leave distributed= out"
            )
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), control)

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.world == 1

    def owner(self, position: int) -> int:
        """The rank that does the work at a position of a list."""
        return position % self.world

    def owns(self, position: int) -> bool:
        """Whether that is this one."""
        return position % self.world == self.rank

    def add(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def add_at(self, owner: int, tensor: Tensor) -> Tensor:
        """Sums a tensor over all ranks; in place at the owner, and of no use at the others."""
        if not self.alone:
            dist.reduce(tensor, dst=owner)
        return tensor

    def send(self, owner: int, tensor: Tensor) -> Tensor:
        """Overwrites a tensor with the owner's."""
        if not self.alone:
            dist.broadcast(tensor, src=owner)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor of every rank, in their order; shapes are equal."""
        if self.alone:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous())
        return found

    def tell(self, value: _Value) -> list[_Value]:
        """A small value of every rank, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def first(self, make: Callable[[], _Value]) -> _Value:
        """What the first rank makes, before the others do the same."""
        if self.rank == 0:
            made = make()
            self.meet("the start")
            return made
        self.meet("the start")
        return make()

    def meet(self, what: str) -> None:
        """Waits for all ranks.

        Args:
            what: What they have been doing, for the error.

        Raises:
            GrassError: A rank is gone; the first rank names it.
        """
        if self.alone:
            return
        try:
            dist.monitored_barrier(self.control, timeout=PATIENCE, wait_all_ranks=True)
        except RuntimeError as error:
            found = _FAILED.search(str(error))
            gone = found[1].strip() if found else ", ".join(map(str, self._gone()))
            who = f"rank {gone}" if gone else "a rank that rank 0 names"
            raise GrassError(
                f"{who} of {self.world} went away during {what}: killed, out of memory, or its machine is gone; look "
                "at its log. What was finished is kept: start the same command again"
            ) from error

    def _gone(self) -> list[int]:
        """Ranks whose connection is closed, as the first rank sees them; none for the others, which cannot tell."""
        if self.rank:
            return []
        gone = []
        for other in range(1, self.world):
            try:
                dist.irecv(torch.empty(1), src=other, group=self.control)  # refused at once by a closed connection
            except RuntimeError:
                gone.append(other)
        return gone

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A piece of work that all ranks do, and that fails on all where it fails on one.

        Args:
            what: The work, for errors.

        Raises:
            GrassError: Another rank failed or is gone. A rank's own error goes on as it is.
        """
        if self.alone:
            yield
            return
        own: BaseException | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must hear of it; it is raised below
            own = error
        self.meet_after(what, own)
        reports = self.tell("" if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        failed = {rank: report for rank, report in enumerate(reports) if report}
        if failed:
            text = "; ".join(f"rank {rank}: {report}" for rank, report in failed.items())
            raise GrassError(f"{what} failed on {len(failed)} of {self.world} ranks: {text}")

    def meet_after(self, what: str, own: BaseException | None) -> None:
        """As `meet`; an error of this rank's own matters more than that somebody is gone."""
        try:
            self.meet(what)
        except GrassError as gone:
            raise own if own is not None else gone from gone


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over ranks (FSDP): then all ranks take part in every pass of any of them."""
    return any(is_distributed(weight) for weight in model.parameters())


def is_distributed(value: object) -> bool:
    """Whether a value is a DTensor; asked by its method, since importing the class takes longer than PyTorch itself."""
    return hasattr(value, "full_tensor")


@contextmanager
def started_by_torchrun(device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks that torchrun started, and this one's device; one process alone where there was no torchrun.

    Args:
        device: ``cpu`` or ``cuda``; of several GPUs each rank takes the one of its number on the machine.

    Yields:
        The ranks, and ``cpu`` or ``cuda:N``.

    Raises:
        UsageError: There are fewer GPUs on this machine than ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield Ranks(), device
        return
    kind, backend = torch.device(device).type, "gloo"
    if kind == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise UsageError(
                f"rank {local} of this machine has no GPU of its own, there are {count}; start fewer ranks"
            )
        device, backend = f"cuda:{local}", "nccl"
        torch.cuda.set_device(local)
    dist.init_process_group(backend, device_id=torch.device(device) if kind == "cuda" else None)
    try:
        yield Ranks.joined(), device
    finally:
        dist.destroy_process_group()
