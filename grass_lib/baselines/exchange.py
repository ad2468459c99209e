"""The folder through which a worker gets its work and gives its answers: JSON and safetensors, nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from grass_lib.baselines.systems import SYSTEMS, Options
from grass_lib.baselines.workload import ModelShape, Outcome, Workload
from grass_lib.errors import BaselineError

JOB, TENSORS, WEIGHTS = "job.json", "data.safetensors", "weights.safetensors"


def write_job(folder: Path, system: str, workload: Workload, options: Sequence[Options], facts: bool) -> str:
    """Puts the work of one system into a folder.

    Args:
        folder: Exists and is empty.
        system: Its key.
        workload: What it works on.
        options: One set after the other.
        facts: Whether it is asked for its facts too.

    Returns:
        SHA-256 of all of it.
    """
    save_file(
        {"train_ids": workload.train_ids.contiguous(), "query_ids": workload.query_ids.contiguous()}, folder / TENSORS
    )
    if workload.weights is None:
        (folder / WEIGHTS).unlink(missing_ok=True)
    else:
        save_file({name: value.contiguous() for name, value in workload.weights.items()}, folder / WEIGHTS)
    job = {
        "system": system,
        "shape": asdict(workload.shape),
        "batch_size": workload.batch_size,
        "device": workload.device,
        "warm_up": workload.warm_up,
        "options": [item.to_json() for item in options],
        "facts": facts,
    }
    (folder / JOB).write_text(json.dumps(job, indent=1), encoding="utf-8")
    digest = hashlib.sha256((folder / JOB).read_bytes())
    for name in (TENSORS, *([] if workload.weights is None else [WEIGHTS])):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_job(folder: Path) -> tuple[str, Workload, list[Options], bool]:
    """What `write_job` wrote."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    data, weights = load_file(folder / TENSORS), folder / WEIGHTS
    workload = Workload(
        shape=ModelShape(**job["shape"]),
        train_ids=data["train_ids"],
        query_ids=data["query_ids"],
        weights=load_file(weights) if weights.exists() else None,
        batch_size=job["batch_size"],
        device=job["device"],
        warm_up=job["warm_up"],
    )
    build = SYSTEMS[job["system"]].options
    options = [build(**{**item, "dampings": tuple(item["dampings"])}) for item in job["options"]]
    return job["system"], workload, options, job["facts"]


def write_outcome(folder: Path, place: int, outcome: Outcome) -> None:
    """Writes one answer; its JSON comes last, and says that the answer is whole.

    Args:
        folder: Of the job.
        place: Among the options.
        outcome: The answer.
    """
    tensors = {f"tensor:{name}": value.detach().cpu().contiguous() for name, value in outcome.tensors.items()}
    if outcome.scores is not None:
        tensors["scores"] = outcome.scores.detach().to("cpu", torch.float32).contiguous()
    save_file(tensors, folder / f"outcome-{place}.safetensors")
    head = {
        "system": outcome.system,
        "label": outcome.label,
        "dampings": list(outcome.dampings),
        "seconds": dict(outcome.seconds),
        "peak_bytes": dict(outcome.peak_bytes),
        "stored_bytes": outcome.stored_bytes,
        "version": outcome.version,
        "details": dict(outcome.details),
    }
    path = folder / f"outcome-{place}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(head, indent=1), encoding="utf-8")
    part.replace(path)


def read_outcome(folder: Path, place: int) -> Outcome:
    """What `write_outcome` wrote.

    Raises:
        BaselineError: It is not there, or cannot be read.
    """
    try:
        head: dict[str, Any] = json.loads((folder / f"outcome-{place}.json").read_text(encoding="utf-8"))
        tensors: dict[str, Tensor] = load_file(folder / f"outcome-{place}.safetensors")
    except (OSError, ValueError) as error:
        raise BaselineError(f"answer {place} of the worker cannot be read ({error}); see log.txt beside it") from error
    scores = tensors.pop("scores", None)
    given = {name.removeprefix("tensor:"): value for name, value in tensors.items()}
    return Outcome(**{**head, "dampings": tuple(head["dampings"])}, scores=scores, tensors=given)
