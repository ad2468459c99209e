"""The interface of an adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from grass_lib.baselines.measure import Phases, folder_size
from grass_lib.baselines.models import build_model, layer_names
from grass_lib.baselines.workload import Workload


class Adapter(ABC):
    """One system with one set of options, on one workload.

    Attributes:
        workload: The work.
        options: Of the system's own class.
        folder: For what the system writes.
        phases: Clocks; see ``Outcome.seconds`` for the names.
        model: Its own copy.
        layers: Names of the layers whose gradients count.
        details: What else the outcome says.
        tensors: Projection matrices, where they are kept.
    """

    def __init__(self, workload: Workload, options: Any, folder: Path) -> None:
        """Builds the model.

        Args:
            workload: The work.
            options: Of the system's own class.
            folder: Empty.
        """
        self.workload, self.options, self.folder = workload, options, folder
        self.phases = Phases(workload.device)
        self.model = build_model(workload.shape, workload.weights, workload.device)
        self.layers = layer_names(self.model)
        self.details: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}

    @abstractmethod
    def cache(self) -> None:
        """Walks over the training set and keeps what queries will need."""

    @abstractmethod
    def attribute(self) -> Tensor:
        """Scores ``(n_damping, n_train, n_query)``, higher where training on the sample helps the query."""

    def warm_up(self) -> None:  # noqa: B027
        """Does what `cache` does on a few batches, where that leaves no trace; nothing where it would."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that the system left in its folder."""
        return folder_size(self.folder)

    @property
    def dampings(self) -> tuple[float | None, ...]:
        """Of the scores' first dimension; None for the library's own default."""
        return self.options.dampings or (None,)

    def batches(self, ids: Tensor) -> Iterator[Tensor]:
        """Token ids ``(n, length)`` in batches, on the device."""
        for part in ids.split(self.workload.batch_size):
            yield part.to(self.workload.device)


def facts_of(system_module: Any, workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """What a system does when it is used as documented, seen here and now: ``{"what", "seen", "expected"}`` each.

    Args:
        system_module: Of the adapter; may have ``facts(workload, folder)``.
        workload: A small one.
        folder: Empty.
    """
    ask = getattr(system_module, "facts", None)
    return [] if ask is None else ask(workload, folder)
