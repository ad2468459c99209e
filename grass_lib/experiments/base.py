"""What every experiment declares, and what experiments share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grass_lib.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from grass_lib.gradients.outputs import Batch, Output


@dataclass(frozen=True, eq=False)
class AttributionTask:
    """What caching and querying need of an experiment: the model, its training data, its text.

    Attributes:
        model: The trained model, on the device, in evaluation mode.
        loss: Loss of one sample, lower is better: what a training sample's gradient is taken of.
        target: What queries ask about, higher is better; None for minus the loss.
        layers: Which layers are captured.
        include_head: Whether the output layer is captured too.
        train: Training data in a fixed order, in batches of one size (the last may be smaller).
        n_train: Training samples.
        data_sha256: Of the training data in that order.
        encode: ``encode(text)``: a prompt as a query batch of one; UsageError where it is too short.
        passage: ``passage(index)``: the text of a training sample.
        parameters: What rebuilds this task.
        fp8: Whether the model's products run in FP8 while gradients are computed.
        answer: ``answer(batch)``: of what `encode` gave, the text that the query's value is of; None where that is the
            prompt itself.
        tokens: ``tokens(text)``: how many tokens a prompt has, and how many of the first `encode` takes; None where it
            takes all.
    """

    model: nn.Module
    loss: Output
    target: Output | None
    layers: str | Sequence[str]
    include_head: bool
    train: Sequence[Batch]
    n_train: int
    data_sha256: str
    encode: Callable[[str], Batch]
    passage: Callable[[int], str]
    parameters: Mapping[str, Any]
    fp8: bool = False
    answer: Callable[[Batch], str] | None = None
    tokens: Callable[[str], tuple[int, int]] | None = None


@dataclass(frozen=True)
class Experiment:
    """One model and data set pair, as the runner, the doctor and the book know it.

    Attributes:
        name: Key, for example ``mlp_mnist``.
        title: For people.
        notebook: File name of the template in ``notebooks/``.
        modules: Dotted names of the modules and packages that decide the results: a finished run is only taken as
            current while their source is unchanged.
        scales: The scales that it has.
        data_fingerprint: ``data_fingerprint(scale)``: a hash of the data, DataError where they are missing.
        validate: ``validate(scale, parameters)``: UsageError where a parameter of the notebook cannot work.
        check: ``check(scale)``: why it would not work here, one sentence each; empty where it would.
        attribution_task: ``attribution_task(scale, parameters, device, progress=True)`` for caching and querying
            outside a notebook; None where the experiment has none.
        optional: Left out of a batch that names no experiments, with the reason, where it would not work here: what it
            needs is no part of the ordinary installation.

    Raises:
        UsageError: A field is empty.
    """

    name: str
    title: str
    notebook: str
    modules: tuple[str, ...]
    scales: tuple[str, ...]
    data_fingerprint: Callable[[str], str]
    check: Callable[[str], list[str]]
    validate: Callable[[str, Mapping[str, Any]], None] | None = None
    attribution_task: Callable[..., AttributionTask] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        for field in ("name", "title", "notebook", "modules", "scales"):
            if not getattr(self, field):
                raise UsageError(f"experiment {self.name!r}: {field} is empty; expected a value")


def resolve_device(device: str) -> str:
    """``auto`` becomes ``cuda`` where a GPU is available, else ``cpu``; anything else stays, checked.

    Raises:
        UsageError: The name is not a device that is usable here.
    """
    import torch

    from grass_lib.devices import known_device

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known_device(device, other_names="auto")
    return device
