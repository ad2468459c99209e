"""A project with one tiny experiment, ``toy``, whose notebook can fail in every way that a notebook can."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

PARAMETERS = """\
scale: str = "embedded"  # set by the runner
run_id: str = ""  # set by the runner
act: str = "good"  # how to end
seed: int = 0  # seed of everything
rate: float = 0.5  # a number
fast: bool = False  # a switch
ks: list[int] = [256, 512]  # dimensions
specs: str = ""  # compressions
"""

WORK = """\
import os, signal, sys, time, warnings
from pathlib import Path
from grass_lib.report.record import Run

parameters = dict(scale=scale, run_id=run_id, act=act, seed=seed, rate=rate, fast=fast, ks=ks, specs=specs)
run = Run.begin(experiment="toy", scale=scale, parameters=parameters, run_id=run_id)
with (run.store / "attempts").open("a") as file:
    file.write("x")
print("root is", Path.cwd(), "python is", sys.executable)
warnings.warn("look here")
print("10%", end="\\r"); print("100%")
"""

ACT = """\
if act == "raise":
    raise ValueError(f"seed {seed} is unlucky")
if act == "exit":
    os._exit(3)
if act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if act == "full":
    raise OSError(28, "No space left on device")
if act == "sleep":
    (run.store / "kernel.pid").write_text(str(os.getpid()))
    time.sleep(60)
"""

END = """\
run.describe_data(source="made up", rows=3, sha256="0" * 64, kind="embedded")
run.result(attributor="trak", projection="sjlt-256", lds={"mean": 0.4, "interval": [0.3, 0.5], "n_models": 30,
           "n_queries": 100, "n_undefined": 0}, damping=0.1, projection_seconds=0.5)
line = run.finish()
None if act == "silent" else line
"""


def notebook(*cells: str, parameters: str = PARAMETERS) -> dict[str, Any]:
    """A template as JSON."""
    sources = [parameters, *(cells or (WORK, ACT, END))]
    code = [
        {
            "cell_type": "code",
            "id": f"cell-{place}",
            "metadata": {"tags": ["parameters"]} if place == 0 else {},
            "execution_count": None,
            "outputs": [],
            "source": source,
        }
        for place, source in enumerate(sources)
    ]
    title = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": "# Toy"}
    return {"cells": [title, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@dataclass
class Toy:
    """The toy project; its attributes may be changed to make the experiment behave in another way."""

    root: Path
    problems: dict[str, list[str]] = field(default_factory=dict)
    fingerprint: Callable[[str], str] = lambda scale: "data-1"
    modules: tuple[str, ...] = ("grass_lib.errors",)

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def template(self) -> Path:
        return self.root / "notebooks" / "toy.ipynb"

    def write(self, *cells: str, parameters: str = PARAMETERS) -> None:
        self.template.write_text(json.dumps(notebook(*cells, parameters=parameters)))

    def experiment(self, name: str = "toy") -> Any:
        return SimpleNamespace(
            name=name,
            title="Toy",
            notebook="toy.ipynb",
            modules=self.modules,
            scales=("embedded", "paper"),
            data_fingerprint=lambda scale: self.fingerprint(scale),
            check=lambda scale: self.problems.get(scale, []),
        )

    def registry(self) -> dict[str, Any]:
        return {"toy": self.experiment()}

    def command(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """`grass` in a process of its own, with the toy registered."""
        driver = self.root / "driver.py"
        driver.write_text(
            "import sys\n"
            "from pathlib import Path\n"
            "import grass_lib.experiments as experiments\n"
            "from toy_project import Toy\n"
            "experiments.EXPERIMENTS = Toy(Path(__file__).parent).registry()\n"
            "from grass_lib.cli import main\n"
            "sys.exit(main())\n"
        )
        environment = {
            **os.environ,
            "GRASS_ROOT": str(self.root),
            "GRASS_RUNS": str(self.runs),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        }
        return subprocess.Popen(
            [sys.executable, str(driver), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=self.root,
            **options,
        )


def make(root: Path) -> Toy:
    """Writes the project."""
    (root / "notebooks").mkdir(parents=True)
    (root / "_config.yml").write_text("title: toy\n")
    toy = Toy(root)
    toy.write()
    return toy
