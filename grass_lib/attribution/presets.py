"""The two factored compressions of the paper under their names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from grass_lib.attribution.influence import InfluenceFunction
from grass_lib.attribution.preconditioner import Precision
from grass_lib.errors import UsageError
from grass_lib.gradients.layers import LayerChoice
from grass_lib.gradients.maps import LayerMasks, LayerMatrices
from grass_lib.gradients.outputs import Output
from grass_lib.gradients.passes import Compile
from grass_lib.ranks import Ranks
from grass_lib.specs import CompressionSpec


class InfluenceOptions(TypedDict, total=False):
    """Keyword arguments of :class:`InfluenceFunction` other than the compression."""

    layers: LayerChoice
    include_head: bool
    hessian: str
    target: Output | None
    store: str | Path | None
    dtype: torch.dtype | str
    seed: int
    device: str | torch.device | None
    masks: LayerMasks | None
    matrices: LayerMatrices | None
    backend: str
    shard_size: int | None
    deterministic: bool
    compile: Compile
    precision: Precision
    fingerprint: Mapping[str, Any] | None
    source: Mapping[str, Any] | None
    ranks: Ranks | None
    progress: bool
    fp8: bool


def LoGra(model: nn.Module, loss: Output, *, k: int = 4096, **options: Unpack[InfluenceOptions]) -> InfluenceFunction:
    """Influence functions with Gaussian projections of both sides of each layer (Choe et al. 2024).

    Args:
        model: The trained model.
        loss: ``loss(model, batch) -> (batch,)``, lower is better.
        k: Compressed size per layer, a square.
        **options: Those of :class:`InfluenceFunction`.

    Raises:
        UsageError: k is not a square, or another argument does not fit.
    """
    spec = logra_spec(k)
    return InfluenceFunction(model, loss, sparsification=str(spec.sparsification), **options)


def FactGraSS(
    model: nn.Module, loss: Output, *, k: int = 4096, blowup: int = 4, **options: Unpack[InfluenceOptions]
) -> InfluenceFunction:
    """Influence functions with the paper's compression of linear layers (section 3.3): masks, then sjlt.

    Args:
        model: The trained model.
        loss: ``loss(model, batch) -> (batch,)``, lower is better.
        k: Compressed size per layer.
        blowup: How many times as long a layer's gradient is between the stages; ``blowup * k`` is a square.
        **options: Those of :class:`InfluenceFunction`.

    Raises:
        UsageError: ``blowup * k`` is not a square, or another argument does not fit.
    """
    spec = factgrass_spec(k, blowup)
    return InfluenceFunction(
        model, loss, sparsification=str(spec.sparsification), projection=str(spec.projection), **options
    )


def logra_spec(k: int = 4096) -> CompressionSpec:
    """``normal-s*s`` with ``s * s = k``.

    Raises:
        UsageError: k is not a square.
    """
    side = _side(k, "k")
    return CompressionSpec.parse(sparsification=f"normal-{side}*{side}")


def factgrass_spec(k: int = 4096, blowup: int = 4) -> CompressionSpec:
    """``random_mask-s*s`` with ``s * s = blowup * k``, then ``sjlt-k``.

    Raises:
        UsageError: ``blowup * k`` is not a square.
    """
    if blowup < 1 or k < 1:
        raise UsageError(f"k is {k} and blowup {blowup}; expected positive numbers, for example 4096 and 4")
    side = _side(blowup * k, "blowup * k")
    return CompressionSpec.parse(sparsification=f"random_mask-{side}*{side}", projection=f"sjlt-{k}")


def _side(size: int, what: str) -> int:
    side = math.isqrt(max(size, 0))
    if size < 1 or side * side != size:
        near = sorted({max(side, 1) ** 2, (side + 1) ** 2}, key=lambda square: abs(square - size))[0]
        raise UsageError(f"{what} is {size}, which is not a square; the nearest is {near} = {math.isqrt(near)}^2")
    return side
