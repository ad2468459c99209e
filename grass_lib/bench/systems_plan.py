"""What ``grass bench systems`` measures: the shapes, and the options of every system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from grass_lib.attribution.presets import factgrass_spec, logra_spec
from grass_lib.baselines.systems import BergsonOptions, DattriOptions, LogIXOptions, Options, OursOptions
from grass_lib.baselines.workload import ModelShape

COMPARED = ("grass_lib", "logix", "dattri", "bergson")
CLAIMED_AGAINST = "LogIX's LoGra"
"""What the paper's claim on throughput compares FactGraSS with, in words."""
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Setting:
    """What is measured on one shape.

    Attributes:
        shape: Of the model.
        vocabulary: Tokens that there are.
        length: Tokens of a block.
        batch_size: Blocks in a batch.
        tokens: Of the training set.
        warm_up: Batches before the clocks start.
        k: Compressed size of a layer.
        systems: Those that take part; whole gradients do not fit, so kronfluence is not among them.
    """

    shape: ModelShape
    vocabulary: int
    length: int
    batch_size: int
    tokens: int
    warm_up: int
    k: int
    systems: tuple[str, ...] = COMPARED


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "tiny": Setting(
            ModelShape("gpt2", {"layers": 2, "width": 32, "heads": 2, "vocabulary": 64, "positions": 32}),
            64, 32, 4, 512, 1, 16,
        ),
        "gpt2": Setting(ModelShape("gpt2", {}, "float32"), 50257, 512, 16, 500_000, 3, 4096),
        "llama": Setting(
            ModelShape("llama", _LLAMA_8B, "bfloat16"), 128256, 1024, 4, 1_000_000, 10, 4096, ("grass_lib", "logix"),
        ),
    }
)  # fmt: skip
"""``llama`` is the paper's protocol: 1M tokens, batch 4, block 1,024, 10 warm-up batches, LogIX's rank 64."""


def options_for(setting: Setting, device: str) -> dict[str, list[Options]]:
    """The options that are measured, by system.

    One walk and what curvature adds to it are timed apart, but for LogIX, which sums its covariance in the walk itself,
    and so is measured without it too.

    Args:
        setting: Of the shape.
        device: ``cpu`` or ``cuda``.
    """
    gpu, side = device.startswith("cuda"), int(setting.k**0.5)
    half = setting.shape.dtype != "float32"
    stored = "bfloat16" if half else "float32"
    log_dtype = "float32" if half else "none"
    compiled: bool | Literal["blocks"] = ("blocks" if half else True) if gpu else False
    found: dict[str, list[Options]] = {
        "grass_lib": [
            OursOptions(spec=str(spec), dtype=stored, compile=compiled)
            for spec in (logra_spec(setting.k), factgrass_spec(setting.k))
        ],
        "logix": [LogIXOptions(rank=side, hessian=hessian, log_dtype=log_dtype) for hessian in ("none", "raw")],
        "dattri": [
            DattriOptions(method=method, k=setting.k, offload="disk" if gpu else "cpu")
            for method in ("logra", "factgrass")
        ],
        "bergson": [BergsonOptions(side=side)],
    }
    return {name: found[name] for name in setting.systems}
