"""The maps that compress layers' gradients: drawn, or given as masks and matrices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.gradients.capture import NORMS
from grass_lib.gradients.layers import LayerShape
from grass_lib.gradients.sides import Side, build_side, given_side
from grass_lib.projection import GivenProjector, Mask, Projector, build_projector
from grass_lib.specs import CompressionSpec, StageSpec

LayerMasks: TypeAlias = Mapping[str, Mask | str | Path]
LayerMatrices: TypeAlias = Mapping[str, Tensor]
"""``{"layer/output": (d_out, k1), "layer/input": (d_in, k2), "layer": (k1 * k2, k)}``, applied as ``x @ matrix``."""


class LayerMaps:
    """Makes both sides and the second stage of one layer after the other.

    Stage 1 of the layer ``name`` takes its numbers from the random streams ``name/output`` and ``name/input``, stage 2
    from ``name``.
    """

    def __init__(
        self,
        spec: CompressionSpec,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        masks: LayerMasks | None,
        matrices: LayerMatrices | None,
        backend: str,
    ) -> None:
        """Keeps the arguments of `FactoredGradients`.

        Args:
            spec: The compression.
            seed: Of the random maps.
            device: Where they go.
            dtype: Of the results.
            masks: By side.
            matrices: By side or layer.
            backend: Of stage 2.
        """
        self._spec, self._seed, self._device, self._dtype, self._backend = spec, seed, device, dtype, backend
        self._masks, self._matrices = dict(masks or {}), dict(matrices or {})
        self._unused = self._masks.keys() | self._matrices.keys()

    def side(self, name: str, side: str, shape: LayerShape) -> Side:
        """The map of a layer's side.

        Args:
            name: Of the layer.
            side: ``output`` or ``input``.
            shape: Of the layer.

        Raises:
            SpecError: The compression does not fit the side.
            UsageError: What was given does not fit it.
        """
        stage = self._spec.sparsification
        if shape.kind in NORMS and side == "input":
            stage = StageSpec("identity")
        place = 0 if side == "output" else 1
        key, d = f"{name}/{side}", shape.d_out if place == 0 else shape.d_in
        mask = self._masks.get(key)
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        given = key in self._matrices and not (stage.is_mask or stage.is_identity)
        if mask is not None or given:
            self._unused.discard(key)
        if given:
            return given_side(stage, place, d, self._matrices[key].to(self._device, wide), name=key)
        return build_side(
            stage,
            place,
            d,
            name=key,
            seed=self._seed,
            device=self._device,
            dtype=wide,
            mask=Mask.load(mask) if isinstance(mask, str | Path) else mask,
        )

    def stage2(self, name: str, size: int) -> Projector | None:
        """The projector of a layer; None where it would not make the gradient shorter.

        Args:
            name: Of the layer.
            size: ``k1 * k2`` after its first stage.

        Raises:
            SpecError: The compression does not fit.
        """
        stage = self._spec.projection
        if stage.k is None or stage.k >= size:
            return None
        if name in self._matrices:
            self._unused.discard(name)
            given = self._matrices[name]
            return GivenProjector(stage, given, p=size, name=name, device=self._device, dtype=self._dtype)
        return build_projector(
            stage, size, seed=self._seed, name=name, device=self._device, dtype=self._dtype, backend=self._backend
        )

    def check_all_used(self) -> None:
        """To be called once all maps are made.

        Raises:
            UsageError: Something was given that no layer uses.
        """
        if self._unused:
            raise UsageError(
                f"masks or matrices has entries for {', '.join(sorted(self._unused)[:4])}, which {self._spec} does not "
                "use here; expected 'LAYER/output' and 'LAYER/input' of captured layers, masks for a selective type, "
                "matrices for a dense one, and 'LAYER' for a matrix of the projection"
            )
