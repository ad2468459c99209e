"""The end of a recorded step: contraction and stage 2 of many layers by few launches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from grass_lib.gradients.capture import LayerCapture, as_tokens
from grass_lib.kernels.contract import DestinationTable, contract, destination_table, fits_contraction
from grass_lib.projection import Projector
from grass_lib.projection.sjlt import SJLTProjector

_COPIED = 2**26  # bytes of sides that lie side by side at a time


class Together:
    """Layers whose contraction a pass has deferred, finished side by side.

    A contraction of one layer is too short to fill a GPU, and dozens of them one after the other cost more in gaps than
    in work. Layers of equal shapes share a launch where the kernel can take them; it computes what
    `LayerCapture.join` and the layer's stage 2 do.
    """

    def __init__(self, captures: Mapping[str, LayerCapture], stage2s: Mapping[str, Projector | None]) -> None:
        """Remembers the layers.

        Args:
            captures: By name.
            stage2s: Projector of each, or None.
        """
        self._captures, self._stage2s = captures, stage2s
        self._tables: dict[str, DestinationTable] = {}

    def __call__(self, sides: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Finishes the layers that can be; the others are not in the result.

        Args:
            sides: Compressed output and input side, ``(batch, ..., k1)`` and ``(batch, ..., k2)``, by layer.

        Returns:
            float32 ``(batch, k_l)`` by layer, with the scales of masks applied.
        """
        groups: dict[tuple[object, ...], list[str]] = {}
        flat: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (left, right) in sides.items():
            second = self._stage2s[name]
            pair = as_tokens(left), as_tokens(right)
            if self._serves(second) and fits_contraction(*pair) and not self._captures[name].appends_bias:
                flat[name] = pair
                key = pair[0].shape, pair[1].shape[2], None if second is None else second.k
                groups.setdefault(key, []).append(name)
        rows: dict[str, Tensor] = {}
        for names in groups.values():
            seconds = [self._table(name) for name in names]
            tables = [table for table in seconds if table is not None]
            found = contract(
                [flat[name][0] for name in names],
                [flat[name][1] for name in names],
                tables or None,
                [self._scale(name) for name in names],
            )
            rows.update(zip(names, found, strict=True))
        return rows

    def products(self, sides: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Contractions alone, of layers with equal shapes by one product of copies side by side.

        Args:
            sides: As in a call.

        Returns:
            ``(batch, k1 * k2)`` by layer, at least float32; layers that are alone with their shapes are not in it.
        """
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, (left, right) in sides.items():
            if not self._captures[name].appends_bias:
                groups.setdefault((left.shape, right.shape, left.dtype, right.dtype), []).append(name)
        rows: dict[str, Tensor] = {}
        for names in groups.values():
            left, right = sides[names[0]]
            step = max(1, _COPIED // (left.nbytes + right.nbytes))
            for part in (names[start : start + step] for start in range(0, len(names), step)):
                if len(part) > 1:
                    lefts, rights = (torch.cat([as_tokens(sides[name][side]) for name in part]) for side in (0, 1))
                    found = self._captures[part[0]].join(lefts, rights)
                    rows.update(zip(part, found.unflatten(0, (len(part), -1)), strict=True))
        return rows

    @staticmethod
    def _serves(second: Projector | None) -> bool:
        return second is None or (
            isinstance(second, SJLTProjector) and second.backend == "kernel" and second.dtype == torch.float32
        )

    def _table(self, name: str) -> DestinationTable | None:
        second = self._stage2s[name]
        if not isinstance(second, SJLTProjector):
            return None
        if name not in self._tables:
            self._tables[name] = destination_table(second.destinations, second.signs < 0, second.k)
        return self._tables[name]

    def _scale(self, name: str) -> float:
        second = self._stage2s[name]
        return self._captures[name].scale * (second.c**-0.5 if isinstance(second, SJLTProjector) else 1.0)
