"""What LogIX does when it is used as documented, seen here and now."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.baselines.adapters.logix import LogIXAdapter
from grass_lib.baselines.models import sequence_losses
from grass_lib.baselines.systems import LogIXOptions
from grass_lib.baselines.workload import Workload
from grass_lib.experiments.models.gpt2 import GPT2Sizes, build_gpt2


def facts(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """Six things that a user of LogIX meets.

    Args:
        workload: A small one.
        folder: Empty.
    """
    return [
        _second_damping(workload, folder / "damping"),
        _factored_twice(workload, folder / "ekfac"),
        _equal_texts(workload, folder / "ids"),
        _early_pca(workload, folder / "pca"),
        _transposed_layers(workload, folder / "layers"),
        _bfloat16(workload, folder / "bfloat16"),
    ]


def _cached(workload: Workload, folder: Path, hessian: str) -> tuple[LogIXAdapter, Any]:
    """A finished cache of eight samples, and the queries' gradients."""
    folder.mkdir()
    adapter = LogIXAdapter(workload, LogIXOptions(rank=4, hessian=hessian), folder)
    run = adapter._start("facts")
    for _ in importlib.import_module("logix").LogIXScheduler(run, lora="random", hessian=hessian, save="grad"):
        adapter._walk(run, workload.train_ids)
        run.finalize()
    run.eval()
    run.setup({"grad": ["log"]})
    with run(data_id=[str(row) for row in range(len(workload.query_ids))]):
        adapter.model.zero_grad(set_to_none=True)
        sequence_losses(adapter.model, workload.query_ids.to(workload.device)).sum().backward()
    return adapter, run


def _apart(one: Tensor, other: Tensor) -> str:
    return f"largest difference {float((one - other).abs().max() / one.abs().max()):.1e} of the largest score"


def _second_damping(workload: Workload, folder: Path) -> dict[str, Any]:
    _, run = _cached(workload, folder, "raw")
    queries, loader = run.get_log(copy=True), run.build_log_dataloader()
    scores = [
        run.compute_influence_all(queries, loader, hessian="raw", damping=damping)["influence"]
        for damping in (1e-3, 1e3)
    ]
    return {
        "what": "influence with damping 0.001, then in the same session with damping 1000",
        "expected": "other scores",
        "seen": _apart(*scores),
        "why": "the first inverse is kept and used for every later call, whatever damping is passed",
    }


def _factored_twice(workload: Workload, folder: Path) -> dict[str, Any]:
    _, run = _cached(workload, folder, "ekfac")
    queries, loader = run.get_log(copy=True), run.build_log_dataloader()
    scores = [run.compute_influence_all(queries, loader)["influence"] for _ in range(2)]
    return {
        "what": "influence with EK-FAC, called twice with the same arguments",
        "expected": "the same scores",
        "seen": _apart(*scores),
        "why": "the damping is added to the stored eigenvalues in place, and computed from the first layer for all",
    }


def _equal_texts(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    ids = torch.cat([workload.train_ids[:4], workload.train_ids[:1]])
    adapter = LogIXAdapter(workload, LogIXOptions(rank=4, hessian="none"), folder)
    run = adapter._start("facts")
    next(importlib.import_module("logix").LogIXScheduler(run, lora="random", hessian="none", save="grad"))
    name = importlib.import_module("logix.utils").DataIDGenerator(mode="hash")
    with run(data_id=name(ids)):
        sequence_losses(adapter.model, ids.to(workload.device)).sum().backward()
    run.finalize()
    return {
        "what": "five sequences, two of them equal, with the ids of LogIX's DataIDGenerator (a hash of the sample)",
        "expected": "5 rows in the log",
        "seen": f"{len(run.build_log_dataset())} rows",
        "why": "the log is a dictionary by id; with ids of one's own, such as positions, all rows stay",
    }


def _early_pca(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    adapter = LogIXAdapter(workload, LogIXOptions(rank=4, init="pca"), folder)
    run = adapter._start("facts")
    run.add_lora()
    early = run.lora_handler.init_strategy
    return {
        "what": "add_lora() with init: pca before any pass over the data",
        "expected": "an error, or principal components",
        "seen": f"init {early}, with a warning in the log",
        "why": "there is no covariance to decompose yet; with LogIXScheduler(lora='pca') a pass comes first, and the "
        "rows of this page with pca use principal components",
    }


def _transposed_layers(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    if workload.shape.kind != "gpt2":
        return {"what": "GPT-2 as transformers builds it", "expected": "", "seen": "not asked", "why": ""}
    model = build_gpt2(GPT2Sizes(**workload.shape.sizes))
    config = folder / "plain.yaml"
    config.write_text(f"root_dir: {folder / 'logs'}\n", encoding="utf-8")
    run = importlib.import_module("logix").LogIX("facts", str(config))
    run.watch(model)
    names = ", ".join(run.logger.modules_to_name.values())
    return {
        "what": "watch() on GPT-2 as transformers builds it, with transposed linear layers (Conv1D)",
        "expected": "its 4 linear layers a block",
        "seen": f"only {names}",
        "why": "torch.nn.Linear alone is known; here every system gets the same model with such layers",
    }


def _bfloat16(workload: Workload, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    adapter = LogIXAdapter(
        replace(workload, shape=replace(workload.shape, dtype="bfloat16")), LogIXOptions(rank=4, hessian="none"), folder
    )
    run = adapter._start("facts")
    next(importlib.import_module("logix").LogIXScheduler(run, lora="random", hessian="none", save="grad"))
    seen = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, own in adapter.model.named_parameters():
            if "logix_lora" in name:
                own.data = own.data.to(dtype)
        try:
            adapter._walk(run, workload.train_ids[:2])
            seen.append("logged")
        except (RuntimeError, TypeError) as error:
            seen.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    return {
        "what": "logging the gradients of a bfloat16 model, and again with the adapters cast to bfloat16",
        "expected": "bfloat16 rows",
        "seen": "; then ".join(seen),
        "why": "adapters are made in torch's default type, and rows pass through NumPy, which has no bfloat16; here "
        "the default type is that of the model, and log_dtype float16 or float32",
    }
