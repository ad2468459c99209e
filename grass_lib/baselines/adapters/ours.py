"""This library, measured like the others."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.attribution import InfluenceFunction
from grass_lib.baselines.adapters.base import Adapter
from grass_lib.baselines.systems import OursOptions
from grass_lib.gradients import chunked_causal_loss
from grass_lib.specs import CompressionSpec


class OursAdapter(Adapter):
    """`InfluenceFunction` with a store on the disk."""

    options: OursOptions

    def _influence(self, name: str) -> InfluenceFunction:
        spec = CompressionSpec.parse(self.options.spec)
        return InfluenceFunction(
            self.model,
            chunked_causal_loss,
            layers=self.layers,
            sparsification=str(spec.sparsification),
            projection=str(spec.projection),
            hessian=self.options.hessian,
            store=self.folder / name,
            dtype=getattr(torch, self.options.dtype),
            compile=self.options.compile,
            deterministic=self.options.deterministic,
            progress=False,
        )

    def _loader(self, ids: Tensor) -> list[dict[str, Tensor]]:
        return [{"input_ids": part, "labels": part} for part in ids.split(self.workload.batch_size)]

    def warm_up(self) -> None:
        """Runs the step itself."""
        self._cached = self._influence("store")
        # Whole batches: a shorter one would be another step to compile.
        size = self.workload.batch_size
        for part in self.workload.train_ids.split(size)[: self.workload.warm_up]:
            if len(part) == size:
                self._cached.warm_up({"input_ids": part, "labels": part})

    def cache(self) -> None:
        """Fills the store; the sums of the curvature grow in the same walk."""
        self._cached = getattr(self, "_cached", None) or self._influence("store")
        with self.phases("gradients"):
            self._cached.cache(self._loader(self.workload.train_ids))
        if self.options.hessian == "eFIM":
            with self.phases("curvature"):
                self._cached._ready_bases(self._cached.store)
        self.details = {"k_total": self._cached.k, "layers": len(self._cached.sizes), "inside": self._cached.timings}

    @property
    def stored_bytes(self) -> int:
        """Of the store."""
        return self._cached.stored_bytes

    def attribute(self) -> Tensor:
        """All damping values in one pass."""
        grid = self.options.dampings or (0.1,)
        damping = {} if self.options.hessian == "Identity" else {"damping": list(grid)}
        with self.phases("scoring"):
            scores = self._cached.attribute(self._loader(self.workload.query_ids), **damping)
        return scores if scores.dim() == 3 else scores[None].expand(len(self.dampings), -1, -1)


ADAPTER = OursAdapter
