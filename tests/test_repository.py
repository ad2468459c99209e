"""The repository itself: templates without outputs, sizes of what is committed, committed runs that verify."""

import json
import subprocess
from pathlib import Path

import pytest

from grass_lib.experiments import EXPERIMENTS
from grass_lib.runner import verify_run

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEASURED = sorted(path.parent for path in (ROOT / "book" / "measured").glob("*/record.json"))


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_experiment_has_its_template():
    assert {path.name for path in NOTEBOOKS} == {experiment.notebook for experiment in EXPERIMENTS.values()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_templates_hold_no_outputs_and_one_cell_of_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert all("".join(cell["source"]).strip() for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1


def test_what_is_committed_stays_small():
    files = tracked()
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert all(path.stat().st_size <= 3e6 for path in files if path.suffix == ".ipynb")


def test_readme_has_no_figure_left_open():
    assert "TIME_" not in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("folder", MEASURED, ids=lambda path: path.name)
def test_committed_runs_verify(folder):
    assert verify_run(folder) == []
