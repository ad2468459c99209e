"""Where the other systems are installed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from grass_lib.errors import UsageError
from grass_lib.project import package_folder, project_root

FOLDER = ".venv-baselines"
VARIABLE = "GRASS_BASELINES"
PATHS = "GRASS_BASELINES_PATH"
"""Folders in which a worker's Python looks for the systems too, where they are not in its own venv."""
REMEDY = "run `make baselines` (2 to 4 minutes, 2.2 GB)"
_ASK = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def baselines_folder() -> Path:
    """The venv of the other systems: what ``GRASS_BASELINES`` names, else ``.venv-baselines`` in the project."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else project_root() / FOLDER


def baselines_stamp() -> Path:
    """The file that is there once the installation was complete."""
    return baselines_folder() / ".installed"


def missing_baselines() -> str:
    """Why the other systems cannot be run here, in one sentence; empty where they can."""
    folder = baselines_folder()
    if (folder / "bin" / "python").exists() and baselines_stamp().exists():
        return ""
    where = VARIABLE if os.environ.get(VARIABLE) else FOLDER
    state = "is not complete" if folder.exists() else "is not there"
    return f"LogIX, dattri, bergson and kronfluence live in a venv of their own, and {where} {state}; {REMEDY}"


def baselines_python() -> Path:
    """The Python that has them.

    Raises:
        UsageError: It is not there.
    """
    problem = missing_baselines()
    if problem:
        raise UsageError(problem)
    return baselines_folder() / "bin" / "python"


def worker_environment(device: str = "cuda") -> dict[str, str]:
    """Environment variables of a worker: this library is importable, nothing else of ours is, nothing downloads.

    Args:
        device: On a CPU nothing is compiled: dattri's compression asks for it, and a machine may have no compiler.
    """
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    paths = [str(package_folder().parent), os.environ.get(PATHS, "")]
    kept["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        kept.setdefault(name, "1")
    if not device.startswith("cuda"):
        kept.setdefault("TORCHDYNAMO_DISABLE", "1")
    kept.setdefault("OMP_WAIT_POLICY", "passive")
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    return kept


def baseline_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages as the baselines' Python has them, without importing them.

    Args:
        packages: Names on PyPI.

    Raises:
        UsageError: The venv is not there, or its Python does not run.
    """
    try:
        done = subprocess.run(
            [baselines_python(), "-c", _ASK, *packages], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"the Python of {FOLDER} does not run ({error}); delete the folder and {REMEDY}") from error
    return json.loads(done.stdout)
