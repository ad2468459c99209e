"""``python -m grass_lib.baselines.worker FOLDER``: what runs in the other systems' Python."""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from grass_lib import __version__
from grass_lib.baselines.adapters.base import Adapter, facts_of
from grass_lib.baselines.exchange import read_job, write_outcome
from grass_lib.baselines.systems import SYSTEMS, Options
from grass_lib.baselines.workload import Outcome, Workload

logger = logging.getLogger("grass_lib.baselines")
_FACT_SAMPLES = 8


def run(folder: Path) -> None:
    """Does what is missing of the job of a folder and writes its outcomes there.

    Args:
        folder: With what `write_job` put there.
    """
    system, workload, options, wants_facts = read_job(folder)
    module = importlib.import_module(SYSTEMS[system].module)
    for place, chosen in enumerate(options):
        if (folder / f"outcome-{place}.json").is_file():
            continue
        logger.info("%s", chosen.label)
        write_outcome(folder, place, _one(module.ADAPTER, system, workload, chosen, folder / f"work-{place}"))
        gc.collect()
        if workload.device.startswith("cuda"):
            torch.cuda.empty_cache()
    if wants_facts and not (folder / "facts.json").is_file():
        few = replace(workload.first(_FACT_SAMPLES), query_ids=workload.query_ids[:2], batch_size=4)
        home = folder / "work-facts"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        part = home / "facts.json"
        part.write_text(json.dumps(facts_of(module, few, home), indent=1), encoding="utf-8")
        part.replace(folder / "facts.json")
        shutil.rmtree(home, ignore_errors=True)


def _one(build: type[Adapter], system: str, workload: Workload, options: Options, home: Path) -> Outcome:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    workload = workload.first(options.few)
    adapter = build(workload, options, home)
    if workload.warm_up:
        adapter.warm_up()
    adapter.cache()
    scores = adapter.attribute() if len(workload.query_ids) else None
    outcome = Outcome(
        system=system,
        label=options.label,
        scores=scores,
        dampings=adapter.dampings,
        seconds=adapter.phases.seconds,
        peak_bytes=adapter.phases.peak_bytes,
        stored_bytes=adapter.stored_bytes,
        version=_version(system),
        tensors=adapter.tensors if options.keep_matrices else {},
        details=adapter.details,
    )
    shutil.rmtree(home, ignore_errors=True)
    return outcome


def _version(system: str) -> str:
    return __version__ if system == "grass_lib" else importlib.metadata.version(SYSTEMS[system].package)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    run(Path(sys.argv[1]))
