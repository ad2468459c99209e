"""dattri: its TRAK, LoGra and FactGraSS attributors."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from grass_lib.baselines.adapters.base import Adapter
from grass_lib.baselines.measure import Phases
from grass_lib.baselines.models import sequence_losses
from grass_lib.baselines.systems import DattriOptions
from grass_lib.baselines.workload import Workload
from grass_lib.gradients.language import log_odds

DEFAULT_DAMPING = 1e-5


class _Blocks(torch.utils.data.Dataset):
    """Token ids as the dictionaries that a transformers model takes."""

    def __init__(self, ids: Tensor, labels: Tensor | None = None) -> None:
        self._ids, self._labels = ids, ids if labels is None else labels

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[place], "labels": self._labels[place]}


class DattriAdapter(Adapter):
    """One of three attributors; the loss is the one that transformers returns, a mean over a batch's tokens.

    dattri multiplies by the batch size, so a sample's gradient is that of its mean token; the sum that the others take
    differs by one factor for all samples, which a relative damping does not see.
    """

    options: DattriOptions

    def _loader(self, ids: Tensor) -> DataLoader:
        return DataLoader(_Blocks(ids), batch_size=self.workload.batch_size, shuffle=False)

    def cache(self) -> None:
        """The attributor's own ``cache``, with the curvature's part of it timed apart."""
        build = self._trak if self.options.method == "trak" else self._block_projected
        self._attributor: Any = build()
        if self.options.method == "trak":
            with self.phases("gradients"):
                self._attributor.cache(self._tuples(self.workload.train_ids))
            return
        apart = [self._timed("compute_preconditioners"), self._timed("compute_ifvp")]
        with self.phases("gradients"):
            self._attributor.cache(self._loader(self.workload.train_ids))
        curvature = sum(call.seconds for call in apart)
        self.phases.seconds["gradients"] -= curvature
        if self.options.hessian == "eFIM":
            self.phases.seconds["curvature"] = curvature
        sides = self._attributor.compressors[0]
        self.details = {
            "layers": len(self.layers),
            "stage 2": type(sides.projector.projector).__name__,
            "stage 2 kind": self._attributor.projector_kwargs["proj_type"],
        }
        if self.options.keep_matrices:
            self.tensors = self._matrices()

    def warm_up(self) -> None:
        """One attributor for a few batches, thrown away; its kernels stay compiled."""
        if self.options.method == "trak":
            return
        few = self.workload.train_ids[: self.workload.warm_up * self.workload.batch_size]
        self._block_projected("warm-up", hessian="Identity").cache(self._loader(few))

    def _timed(self, name: str) -> _Timed:
        call = _Timed(getattr(self._attributor, name), self.workload.device)
        setattr(self._attributor, name, call)
        return call

    def _task(self, loss: Callable[..., Tensor], target: Callable[..., Tensor] | None = None) -> Any:
        task = importlib.import_module("dattri.task")
        return task.AttributionTask(
            loss_func=loss, model=self.model, checkpoints=[self.model.state_dict()], target_func=target
        )

    def _block_projected(self, name: str = "cache", hessian: str | None = None) -> Any:
        algorithm = importlib.import_module("dattri.algorithm")

        def loss(model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
            return model(**{key: value.to(device) for key, value in batch.items()}).loss

        cls = {"logra": algorithm.LoGraAttributor, "factgrass": algorithm.FactGraSSAttributor}[self.options.method]
        options: dict[str, Any] = {"proj_dim": self.options.k}
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return cls(
            task=self._task(loss),
            layer_names=self.layers,
            hessian=hessian or self.options.hessian,
            damping=self.dampings[0],
            device=self.workload.device,
            offload=self.options.offload,
            cache_dir=str(folder),
            **options,
        )

    def _tuples(self, ids: Tensor) -> DataLoader:
        data = torch.utils.data.TensorDataset(ids, torch.arange(len(ids)))
        return DataLoader(data, batch_size=self.workload.batch_size, shuffle=False)

    def _trak(self) -> Any:
        """TRAK with log-odds as output; the weight is one minus the probability of a sequence's mean token."""
        algorithm = importlib.import_module("dattri.algorithm")
        call = torch.func.functional_call

        class Losses(torch.nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Tensor) -> Tensor:
                return sequence_losses(self.model, ids) / (ids.shape[1] - 1)

        wrapped = Losses(self.model)

        def nested(parameters: Any) -> dict[str, Tensor]:
            return {f"model.{name}": value for name, value in parameters.items()}

        def output(parameters: Any, data: Any) -> Tensor:
            return log_odds(call(wrapped, nested(parameters), (data[0][None],)))[0]

        def probability(parameters: Any, data: Any) -> Tensor:
            return torch.exp(-call(wrapped, nested(parameters), (data[0][None],)))

        kinds = {"proj_type": "normal", "proj_dim": self.options.k}
        if not self.options.k:
            kinds = {"proj_type": "identity", "proj_dim": 1}
        layer = [name.strip() for name in self.options.layer.split(",")] if self.options.layer else None
        return algorithm.TRAKAttributor(
            task=self._task(output),
            correct_probability_func=probability,
            projector_kwargs={"proj_max_batch_size": 64, "device": self.workload.device, **kinds},
            layer_name=layer,
            device=self.workload.device,
            regularization=self.options.dampings[0] if self.options.dampings else 0.0,
        )

    @property
    def stored_bytes(self) -> int:
        """In its folder; in memory, where nothing goes to the disk: rows, and rows times the inverse."""
        if self.options.offload == "disk" and self.options.method != "trak":
            return super().stored_bytes
        self.details["in_memory"] = True
        if self.options.method == "trak":
            return sum(part.nbytes for part in self._attributor.inv_XTX_XT_list)
        copies = 1 + (self.options.hessian == "eFIM")
        return copies * 4 * len(self.workload.train_ids) * self._attributor.total_proj_dim

    @property
    def dampings(self) -> tuple[float | None, ...]:
        """TRAK has one absolute value, the others a relative one at a time."""
        given = self.options.dampings
        return (given[:1] or (None,)) if self.options.method == "trak" else (given or (None,))

    def attribute(self) -> Tensor:
        """One value after the other: another damping is another inverse, and another product with all rows."""
        if self.options.method == "trak":
            with self.phases("scoring"):
                return self._attributor.attribute(self._tuples(self.workload.query_ids))[None]
        train, found = self._loader(self.workload.train_ids), []
        for place, damping in enumerate(self.dampings):
            with self.phases("scoring"):
                if place and self.options.hessian == "eFIM":
                    self._attributor.compute_preconditioners(damping)
                    self._attributor.compute_ifvp()
                found.append(self._attributor.attribute(train, self._loader(self.workload.query_ids)).float())
        return torch.stack(found)

    def _matrices(self) -> dict[str, Tensor]:
        """Both sides and stage 2, asked for by projecting unit vectors."""
        found = {}
        for name, compressor in zip(self.layers, self._attributor.compressors, strict=True):
            linear = self.model.get_submodule(name)
            d_in = linear.in_features + (linear.bias is not None)
            left, right = compressor.sparsifier.sparsifier_comp
            found[f"{name}/output"] = _asked(left, linear.out_features, linear.weight)
            found[f"{name}/input"] = _asked(right, d_in, linear.weight)
            if self.options.method == "factgrass":
                size = found[f"{name}/output"].shape[1] * found[f"{name}/input"].shape[1]
                found[name] = _asked(compressor.projector.projector, size, linear.weight)
        return found


class _Timed:
    """A method whose seconds are summed, the device synchronised."""

    def __init__(self, call: Callable[..., Any], device: str) -> None:
        self._call, self._phases = call, Phases(device, memory=False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with self._phases("call"):
            return self._call(*arguments, **named)

    @property
    def seconds(self) -> float:
        return self._phases.seconds.get("call", 0.0)


def _asked(project: Any, size: int, like: Tensor) -> Tensor:
    """The matrix ``(size, k)`` of a projection, from unit vectors in portions of the size that it was made for."""
    unit = torch.eye(size, device=like.device, dtype=like.dtype)
    step = max(1, min(size, math.ceil(2**22 / size)))
    return torch.cat([project(part.contiguous(), ensemble_id=0).detach().cpu().float() for part in unit.split(step)])


def facts(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """What dattri does when it is used as documented."""
    found = [_stage2(workload, folder / "stage2"), _padding(workload, folder / "padding"), _shared(workload, folder)]
    return found if torch.cuda.is_available() else [*found, _disk(workload, folder / "disk")]


def _stage2(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    attributor = DattriAdapter(workload, DattriOptions(method="factgrass", k=16), folder)._block_projected()
    return {
        "what": f"the second stage of FactGraSSAttributor(device={workload.device!r})",
        "expected": "sjlt",
        "seen": attributor.projector_kwargs["proj_type"],
        "why": "sjlt is chosen for the device string 'cuda' alone; 'cuda:0' and 'cpu' get a dense Gaussian matrix",
    }


def _padding(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    ids = workload.train_ids[:4]
    labels = ids.clone()
    labels[1:, ids.shape[1] // 4 :] = -100
    rows = []
    for size in (1, 4):
        few = replace(workload, train_ids=ids, batch_size=size)
        adapter = DattriAdapter(few, DattriOptions(k=16, hessian="Identity", offload="none"), folder / str(size))
        adapter.folder.mkdir()
        attributor = adapter._block_projected(hessian="Identity")
        attributor.cache(DataLoader(_Blocks(ids, labels), batch_size=size))
        stored = attributor.offload_manager.create_gradient_dataloader(data_type="gradients", batch_size=4)
        rows.append(torch.cat([part for part, _ in stored])[0])
    change = float((rows[0] - rows[1]).norm() / rows[0].norm())
    return {
        "what": "one sequence alone, and beside three with most labels ignored (-100)",
        "expected": "the same gradient",
        "seen": f"{change:.0%} of its norm apart",
        "why": "gradients of a mean over the batch's tokens are multiplied by the batch size, which is right only "
        "where all sequences have equally many",
    }


def _shared(workload: Workload, folder: Path) -> dict[str, Any]:
    adapters = [DattriAdapter(workload, DattriOptions(method="trak", k=k), folder) for k in (8, 16)]
    first, second = (adapter._trak() for adapter in adapters)
    return {
        "what": "a TRAKAttributor with proj_dim 8, then another one with 16",
        "expected": "8 and 16",
        "seen": " and ".join(str(each.projector_kwargs["proj_dim"]) for each in (first, second)),
        "why": "both update one dictionary of the module",
    }


def _disk(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    seen = "works"
    try:
        adapter = DattriAdapter(workload, DattriOptions(k=16, offload="disk"), folder)
        adapter.cache()
    except RuntimeError as error:
        seen = f"RuntimeError: {str(error).split(';')[0]}"
    return {
        "what": "offload='disk' without a GPU",
        "expected": "gradients on the disk",
        "seen": seen,
        "why": "its buffers are pinned memory, which needs a GPU; offload='cpu' works",
    }


ADAPTER = DattriAdapter
