"""Toy experiments that processes on a node know too: a folder with ``sitecustomize.py`` on their path registers them.

``first`` and ``second`` are notebooks whose middle lasts as long as a file says; ``stored`` fills a gradient store.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import toy_project

from grass_lib.experiments.base import AttributionTask, Experiment

REPOSITORY = Path(__file__).resolve().parents[2]
N, BATCH = 23, 2

BEGIN = """\
import time
from pathlib import Path
from grass_lib.report.record import Run

parameters = dict(scale=scale, run_id=run_id, act=act, seed=seed, steps=steps)
run = Run.begin(experiment="{name}", scale=scale, parameters=parameters, run_id=run_id)
with (run.store / "attempts").open("a") as file:
    file.write("x")
"""

# Each step is a file that a later attempt finds; in the middle the notebook waits until it is let go.
WORK = """\
done = []
for step in range(steps):
    file = run.store / f"step{{step}}"
    if not file.exists():
        if step == steps // 2 and (Path("{root}") / "hold").exists():
            (run.store / "waiting").write_text("x")
            while (Path("{root}") / "hold").exists():
                time.sleep(0.05)
        file.write_text(str(seed * 1000 + step ** 2))
        done.append(step)
if act == "raise":
    raise ValueError(f"seed {{seed}} is unlucky")
"""

PARAMETERS = """\
scale: str = "embedded"  # set by the runner
run_id: str = ""  # set by the runner
act: str = "good"  # how to end
seed: int = 0  # seed of everything
steps: int = 6  # files to make
"""


def _check(scale: str) -> list[str]:
    # On the node everything works; where jobs are submitted from it need not.
    return [] if "SLURM_JOB_ID" in os.environ or scale == "embedded" else ["there is no GPU here"]


def _task(scale: str, parameters: Any, device: str, progress: bool = True) -> AttributionTask:
    """As in the tests of `grass store`; every batch waits while a file holds it."""
    import torch
    import zoo
    from torch.nn import functional

    def loss(model, batch) -> torch.Tensor:
        (ids,) = batch
        following = functional.pad(ids[:, 1:], (0, 1), value=-100)
        losses = functional.cross_entropy(model(ids).flatten(0, 1), following.flatten(), reduction="none")
        return losses.view(ids.shape).sum(dim=1)

    (ids,) = zoo.make_samples("text", N)
    parts = [(part,) for part in ids.split(BATCH)]

    class Slow(list):
        def __iter__(self):
            for place, part in enumerate(parts):
                hold = Path(os.environ["GRASS_ROOT"]) / "hold"
                while place >= len(parts) // 2 and hold.exists():
                    (hold.parent / f"stored-{os.environ.get('SLURM_ARRAY_TASK_ID')}").touch()
                    time.sleep(0.05)
                yield part

    return AttributionTask(
        model=zoo.make_model("text"), loss=loss, target=None, layers="linear", include_head=False, train=Slow(parts),
        n_train=N, data_sha256="0" * 64, encode=lambda text: (ids[:1],), passage=str, parameters=parameters,
    )  # fmt: skip


def registry() -> dict[str, Experiment]:
    """The experiments by name."""
    return {
        name: Experiment(
            name=name,
            title=name.title(),
            notebook=f"{name}.ipynb",
            modules=("grass_lib.errors",),
            scales=("embedded", "paper"),
            data_fingerprint=lambda scale: "data-1",
            check=_check,
            attribution_task=_task if name == "stored" else None,
        )
        for name in ("first", "second", "stored")
    }


def make(root: Path) -> Path:
    """Writes a project with the notebooks, and what registers them in every process that has ``site/`` on its path."""
    (root / "notebooks").mkdir(parents=True)
    (root / "_config.yml").write_text("title: toys\n")
    for name in registry():
        cells = [BEGIN.format(name=name), WORK.format(root=root), toy_project.END]
        content = toy_project.notebook(*cells, parameters=PARAMETERS)
        (root / "notebooks" / f"{name}.ipynb").write_text(json.dumps(content))
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(
        "import grass_lib.experiments, cluster_toys\ngrass_lib.experiments.EXPERIMENTS = cluster_toys.registry()\n"
    )
    return root


def environment(root: Path) -> dict[str, str]:
    """What processes of the project need."""
    folders = [root / "site", REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "cluster"]
    paths = os.pathsep.join(map(str, folders))
    return {"GRASS_ROOT": str(root), "GRASS_RUNS": str(root / "runs"), "PYTHONPATH": paths}
