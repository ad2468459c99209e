"""The model that `grass bench throughput` measures: any causal language model, with random weights or its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.bench.throughput_steps import arithmetic
from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.models.llama import SHAPES, llama_config, random_llama

DTYPES = ("bfloat16", "float16", "float32")
_PRODUCT = 8192  # side of the square matrices whose product is the yardstick


@dataclass
class BenchModel:
    """A model on its device.

    Attributes:
        model: In evaluation mode.
        name: As it was asked for.
        weights: ``random`` or ``pretrained``.
        dtype: Name of its type.
        build_seconds: Of making it.
        narrow: Types of weights and buffers before they were widened.
    """

    model: Any
    name: str
    weights: str
    dtype: str
    build_seconds: float
    narrow: dict[str, torch.dtype] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.config.vocab_size)

    def widened(self) -> Any:
        """The same model in float32, in place."""
        self.narrow = {name: value.dtype for name, value in self._values()}
        self.model = self.model.float()
        return self.model

    def narrowed(self) -> Any:
        """The model as it was before it was widened, bit for bit, in place."""
        for name, value in self._values():
            value.data = value.data.to(self.narrow.get(name, value.dtype))
        self.narrow = {}
        return self.model

    def _values(self) -> list[tuple[str, Tensor]]:
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def facts(self, block: int) -> dict[str, Any]:
        """Name, sizes, and the operations that a token needs at least."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "name": self.name,
            "weights": self.weights,
            "dtype": self.dtype,
            "parameters": count,
            "build_seconds": self.build_seconds,
            "operations_per_token": arithmetic(self.model, block),
        }


def build(name: str, *, weights: str = "random", dtype: str = "bfloat16", device: torch.device) -> BenchModel:
    """Makes the model directly where it will run.

    Args:
        name: A shape such as ``llama-3.1-8b``, or a model of the hub, or a folder with a ``config.json``.
        weights: ``random``, or ``pretrained`` for a model of the hub or a folder.
        dtype: Of the weights.
        device: Where it goes.

    Raises:
        UsageError: The words are wrong.
        DataError: The model cannot be had.
    """
    if weights not in ("random", "pretrained"):
        raise UsageError(f"weights is {weights!r}; expected random or pretrained")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    kind, start = getattr(torch, dtype), time.perf_counter()
    if name in SHAPES:
        if weights == "pretrained":
            raise UsageError(f"{name} is a shape without weights; expected weights=random, or a model of the hub")
        model = random_llama(llama_config(SHAPES[name]), device=device, dtype=kind)
    else:
        model = _known(name, weights, kind, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return BenchModel(model, name if name in SHAPES else Path(name).name, weights, dtype, time.perf_counter() - start)


def product_speed(device: torch.device, dtype: str) -> float:
    """Operations a second of a large matrix product on a GPU: the best of ten."""
    a, b = (torch.randn(_PRODUCT, _PRODUCT, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = 0.0
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        _ = a @ b
        end.record()
        end.synchronize()
        best = max(best, 2.0 * _PRODUCT**3 / (1e-3 * begin.elapsed_time(end)))
    return best


def _known(name: str, weights: str, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DataError("the benchmark needs transformers, not installed here; run `make setup`") from error
    try:
        if weights == "random":
            return random_llama(transformers.AutoConfig.from_pretrained(name), device=device, dtype=dtype)
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
        return found.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the model {name!r} could not be had ({type(error).__name__}: {error}); expected one of "
            f"{', '.join(SHAPES)}, a model of the hub, or a folder with config.json"
        ) from error
