"""What every system gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from grass_lib.errors import UsageError

KINDS = ("gpt2", "llama")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelShape:
    """A language model: its architecture and where its weights come from.

    Every worker builds it by itself. Linear layers are all of one class, ``torch.nn.Linear``: the transposed layers of
    GPT-2 are exchanged for it, since LogIX, dattri and kronfluence know no other.

    Attributes:
        kind: ``gpt2`` or ``llama``.
        sizes: For gpt2 the fields of ``GPT2Sizes``; for llama those of transformers' ``LlamaConfig``.
        dtype: Of the weights.
        seed: Of random weights, where the workload brings none.

    Raises:
        UsageError: A field does not fit.
    """

    kind: str
    sizes: Mapping[str, int]
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"kind of model is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True, eq=False)
class Workload:
    """The same work for every system: model, data, batches, layers, precision, device.

    The training loss and what is asked about a query are the sum of the cross-entropy over a sequence's own tokens;
    layers are all linear ones but the output layer. Scores are comparable where the higher one means the more helpful
    sample.

    Attributes:
        shape: Of the model.
        train_ids: int64 ``(n_train, length)``, no padding.
        query_ids: int64 ``(n_query, length)``; ``n_query = 0`` where only caching is measured.
        weights: By name, as ``weights_of`` gives them for GPT-2; None for random ones.
        batch_size: Sequences in a batch.
        device: ``cpu`` or ``cuda``.
        warm_up: Batches that a system works on before its clocks start.

    Raises:
        UsageError: A field does not fit.
    """

    shape: ModelShape
    train_ids: Tensor
    query_ids: Tensor
    weights: Mapping[str, Tensor] | None = None
    batch_size: int = 32
    device: str = "cpu"
    warm_up: int = 0

    def __post_init__(self) -> None:
        for name, ids in (("train_ids", self.train_ids), ("query_ids", self.query_ids)):
            if ids.dim() != 2 or ids.is_floating_point():
                raise UsageError(f"{name} has shape {tuple(ids.shape)} and type {ids.dtype}; expected token ids (n, T)")
        if not len(self.train_ids):
            raise UsageError("train_ids is empty; expected at least one sequence")
        if self.batch_size < 1 or self.warm_up < 0:
            raise UsageError(
                f"batch_size is {self.batch_size} and warm_up {self.warm_up}; expected 1 or more, and 0 or more"
            )

    def first(self, few: int) -> Workload:
        """The first so many training sequences, and as many queries at most; itself for 0."""
        if not few:
            return self
        return replace(self, train_ids=self.train_ids[:few], query_ids=self.query_ids[:few])

    @property
    def tokens(self) -> int:
        """Tokens of the training sequences."""
        return self.train_ids.numel()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one system did with one set of options.

    Attributes:
        system: Its key in ``SYSTEMS``.
        label: Its name with the options, for tables.
        scores: float32 ``(n_damping, n_train, n_query)``, higher where training on the sample helps the query; None
            where there are no queries.
        dampings: Of the first dimension of ``scores``.
        seconds: By phase, the device synchronised: ``gradients`` (one walk over the training set, compressed and
            stored), ``more passes`` (further walks before it or after it), ``curvature``, ``queries``, ``scoring``.
        peak_bytes: Largest memory by phase: allocated on a GPU, resident on a CPU; empty where it cannot be measured.
        stored_bytes: What the system left on the disk, or keeps in memory where it stores nothing (``in_memory``).
        version: Of the library.
        tensors: Projection matrices and the like, by name, where they were asked for.
        details: Anything else, as JSON values.
    """

    system: str
    label: str
    scores: Tensor | None
    dampings: tuple[float | None, ...]
    seconds: Mapping[str, float]
    peak_bytes: Mapping[str, int]
    stored_bytes: int
    version: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def tokens_per_second(self, tokens: int, *, curvature: bool) -> float:
        """Throughput of caching.

        Args:
            tokens: Of the training sequences.
            curvature: Whether everything that is needed before queries can be scored counts, or the walk over the
                training set alone.
        """
        names = ("gradients", "more passes", "curvature") if curvature else ("gradients",)
        total = sum(self.seconds.get(name, 0.0) for name in names)
        return tokens / total if total else float("nan")
