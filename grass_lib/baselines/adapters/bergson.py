"""bergson: an index of gradients on the disk, and a scorer."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.baselines.adapters.base import Adapter
from grass_lib.baselines.systems import BergsonOptions
from grass_lib.baselines.workload import Workload

DEFAULT_DAMPING = 0.1


class BergsonAdapter(Adapter):
    """``collect_gradients`` builds the index, the autocorrelation collector fits the Hessian, ``Scorer`` scores.

    Its names of layers are those below ``model.base_model``, which leaves the output layer out. Sums of losses over a
    sequence are its default.
    """

    options: BergsonOptions

    def _config(self, name: str) -> Any:
        bergson = importlib.import_module("bergson")
        config = bergson.IndexConfig(
            run_path=str(self.folder / name),
            projection_dim=self.options.side,
            projection_type=self.options.projection_type,
            include_bias=self.options.include_bias,
            token_batch_size=self.workload.batch_size * self.workload.train_ids.shape[1],
        )
        config.partial_run_path.mkdir(parents=True, exist_ok=True)
        return config

    def _processor(self) -> Any:
        bergson = importlib.import_module("bergson")
        return bergson.GradientProcessor(
            projection_dim=self.options.side or None,
            projection_type=self.options.projection_type,
            include_bias=self.options.include_bias,
        )

    def _data(self, ids: Tensor) -> tuple[Any, list[list[int]]]:
        datasets = importlib.import_module("datasets")
        data = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)})
        size = self.workload.batch_size
        return data, [list(range(first, min(first + size, len(ids)))) for first in range(0, len(ids), size)]

    def _collect(self, name: str, ids: Tensor) -> Path:
        bergson = importlib.import_module("bergson")
        config = self._config(name)
        data, batches = self._data(ids)
        bergson.collect_gradients(model=self.model, data=data, processor=self._processor(), cfg=config, batches=batches)
        return config.partial_run_path

    def warm_up(self) -> None:
        """An index of a few batches that nobody reads."""
        self._freeze()
        self._collect("warm-up", self.workload.train_ids[: self.workload.warm_up * self.workload.batch_size])

    def _freeze(self) -> None:
        """Only the embeddings ask for a gradient, as in bergson's own loader: they start the backward pass."""
        self.model.requires_grad_(False)
        self.model.get_input_embeddings().requires_grad_(True)

    def cache(self) -> None:
        """The index, and a second pass for the Hessian."""
        self._freeze()
        with self.phases("gradients"):
            self._index = self._collect("index", self.workload.train_ids)
        if self.options.hessian == "autocorrelation":
            with self.phases("curvature"):
                self._fit()
        self.details = {"layers": len(self.layers), "index dtype": str(self._rows(self._index).dtype)}
        if self.options.keep_matrices and self.options.side:
            self.tensors = self._matrices()

    def _fit(self) -> None:
        bergson = importlib.import_module("bergson")
        collectors = importlib.import_module("bergson.hessians.autocorrelation")
        config = self._config("hessian")
        data, batches = self._data(self.workload.train_ids)
        self._fitted = self._processor()
        collector = collectors.AutocorrelationCollector(
            model=self.model.base_model,
            processor=self._fitted,
            data=data,
            path=str(config.partial_run_path),
        )
        computer = bergson.CollectorComputer(
            model=self.model, data=data, collector=collector, batches=batches, cfg=config
        )
        computer.run_with_collector_hooks(desc="hessian")

    def _rows(self, path: Path) -> Any:
        return importlib.import_module("bergson").load_gradients(path)

    def _layers(self, path: Path) -> dict[str, Tensor]:
        found = importlib.import_module("bergson").load_module_gradients(path)
        return {name: torch.from_numpy(found[name].astype("float32")) for name in found}

    def attribute(self) -> Tensor:
        """Queries as an index of their own, preconditioned, against the rows of the training index."""
        with self.phases("queries"):
            queries = self._layers(self._collect("queries", self.workload.query_ids))
        return torch.stack([self._scores(queries, damping) for damping in self.dampings])

    def _scores(self, queries: dict[str, Tensor], damping: float | None) -> Tensor:
        bergson = importlib.import_module("bergson")
        with self.phases("scoring"):
            if self.options.hessian == "autocorrelation":
                queries = self._preconditioner(DEFAULT_DAMPING if damping is None else damping).apply(queries)
            writer = importlib.import_module("bergson.score.score_writer").InMemorySequenceScoreWriter(
                len(self.workload.train_ids), len(self.workload.query_ids), dtype=torch.float32
            )
            scorer = bergson.Scorer(
                query_grads=queries,
                modules=list(queries),
                writer=writer,
                device=torch.device(self.workload.device),
                dtype=torch.float32,
            )
            rows = self._layers(self._index)
            scorer(list(range(len(self.workload.train_ids))), rows)
            return torch.as_tensor(writer.scores).float()

    def _preconditioner(self, damping: float) -> Any:
        """Of the eigenvectors that the fit has made: ``from_processor`` would make them anew for every damping."""
        multiplier = importlib.import_module("bergson.hessians.inversion").eigenvalue_multiplier
        inverses = {}
        for name, (found, vectors) in self._fitted.hessians_eigen.items():
            values, vectors = found.double().clamp_min(0), vectors.to(self.workload.device)
            factors = multiplier("damped_inverse", values, values.mean(), damping)
            inverses[name] = vectors * factors.to(vectors) @ vectors.mT
        return importlib.import_module("bergson.hessians.preconditioner").DensePreconditioner(inverses)

    def _matrices(self) -> dict[str, Tensor]:
        """Each side's matrix as ``x @ matrix``; without a bias column its row is zero."""
        make = importlib.import_module("bergson.collector.collector").create_module_projection_matrix
        found, side = {}, self.options.side
        for name in self.layers:
            linear = self.model.get_submodule(name)
            own = name.removeprefix(f"{self.model.base_model_prefix}.")
            bias = linear.bias is not None
            kinds = (torch.float32, torch.device("cpu"), self.options.projection_type, "jl", None)
            width = linear.in_features + (bias and self.options.include_bias)
            found[f"{name}/output"] = make(own, "left", side, linear.out_features, *kinds).mT.contiguous()
            right = make(own, "right", side, width, *kinds).mT
            if bias and not self.options.include_bias:
                right = torch.cat([right, right.new_zeros(1, side)])
            found[f"{name}/input"] = right.contiguous()
        return found


def facts(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """What bergson does when it is used as documented."""
    widths = []
    for number, bias in enumerate((False, True)):
        place = folder / str(number)
        place.mkdir()
        adapter = BergsonAdapter(workload, BergsonOptions(side=0, include_bias=bias, hessian="none"), place)
        adapter.cache()
        widths.append(adapter._rows(adapter._index).shape[1])
    return [
        {
            "what": "an index with default arguments, and with include_bias=True",
            "expected": "all weights of the linear layers",
            "seen": f"{widths[0]:,} and {widths[1]:,} values a sample",
            "why": "gradients of biases are left out by default; the other systems here take them, LogIX excepted",
        }
    ]


ADAPTER = BergsonAdapter
