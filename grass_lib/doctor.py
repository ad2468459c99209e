"""What would work on this machine, found out without starting or downloading anything.

The network is used for one question only: whether a token that is here may read a gated model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grass_lib.errors import GrassError, UsageError
from grass_lib.project import project_root, runs_root
from grass_lib.report.environment import cpu_count, device_facts, memory_bytes

#: How long Slurm has to answer.
SLURM_SECONDS = 5
#: Free space in bytes below which runs are likely to fill the disk.
LITTLE_SPACE = 2 * 10**9
NEEDED = {
    "papermill": "runs the notebooks",
    "ipykernel": "runs the notebooks",
    "matplotlib": "figures",
    "seaborn": "figures",
    "itables": "tables",
    "plotly": "interactive figures",
    "jupyter_book": "the book",
}


@dataclass(frozen=True)
class Fact:
    """One line about this machine.

    Attributes:
        name: what.
        value: what was found.
        good: True, False, or None where it is neither, such as an optional package that is missing.
        advice: what to do, where something can be done.
    """

    name: str
    value: str
    good: bool | None = None
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether one experiment works here at one scale.

    Attributes:
        experiment: key of the experiment.
        title: its title.
        scale: ``embedded`` or ``paper``.
        problems: why not, each with what to do; empty where it works.
    """

    experiment: str
    title: str
    scale: str
    problems: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether it works here."""
        return not self.problems


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> list[Fact]:
    if importlib.util.find_spec("torch") is None:
        return [Fact("torch", "missing", False, "make setup")]
    import torch

    fact = Fact("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none (CPU build)'}", True)
    if torch.cuda.is_available():
        gpu = device_facts("cuda")
        return [fact, Fact("GPU", f"{gpu['name']}, {_gigabytes(gpu['memory_bytes'])}, driver {gpu['driver']}", True)]
    advice = "not needed at embedded scale; for paper scale use a machine with one"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        advice = "there is a driver, but torch is a CPU build; install a CUDA build of torch"
    return [fact, Fact("GPU", "none that torch can use", None, advice)]


def _kernel_packages() -> list[Fact]:
    facts = []
    for name in ("sjlt", "fast_jl"):
        if importlib.util.find_spec(name) is None:
            facts.append(Fact(name, "not installed", None, "optional, nothing needs it; make cuda (GPU and nvcc)"))
            continue
        usable = True
        if name == "sjlt":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns at import where there is no GPU; the line below says it
                import sjlt  # pyright: ignore[reportMissingImports]
            usable = bool(getattr(sjlt, "EXTENSION_AVAILABLE", False))
        value = f"{_version(name) or 'installed'}{'' if usable else ', without its GPU part'}"
        facts.append(Fact(name, value, usable or None, "" if usable else "make cuda, on a machine with a GPU and nvcc"))
    return facts


def _baselines() -> Fact:
    from grass_lib.baselines.environment import baseline_versions, missing_baselines
    from grass_lib.baselines.systems import SYSTEMS

    problem = missing_baselines()
    if problem:
        return Fact("other systems", "not installed", None, "only logix_comparison needs them; make baselines")
    packages = [system.package for name, system in SYSTEMS.items() if name != "grass_lib"]
    try:
        found = baseline_versions(packages)
    except GrassError as error:
        return Fact("other systems", str(error), False)
    missing = [name for name in packages if name not in found]
    value = ", ".join(f"{name} {version}" for name, version in found.items())
    return Fact("other systems", value, not missing, f"{', '.join(missing)} missing; make baselines" * bool(missing))


def _data_folder() -> Fact:
    named = os.environ.get("GRASS_DATA")
    if not named:
        return Fact("GRASS_DATA", "not set", None, "paper scale then takes its data from the Hugging Face hub")
    if not Path(named).expanduser().is_dir():
        return Fact(
            "GRASS_DATA",
            f"{named} is not a folder",
            False,
            "set it to the folder with mnist/ and the others, or unset it",
        )
    inside = sorted(item.name for item in Path(named).expanduser().iterdir() if item.is_dir())
    return Fact("GRASS_DATA", f"{named} with {', '.join(inside) or 'nothing inside'}", bool(inside))


def _gated_model() -> Fact:
    """Whether Llama's weights can be had; the hub is asked only where there is a token, and nothing is downloaded."""
    from grass_lib.experiments.models.llama import FOLDER, HUB, hub_access, llama_folder

    try:
        if llama_folder() is not None:
            return Fact(HUB, f"found in GRASS_DATA/{FOLDER}", True)
    except GrassError as error:
        return Fact(HUB, str(error), False)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return Fact(HUB, "HF_HUB_OFFLINE is on", None, f"put the model into GRASS_DATA/{FOLDER}, or use weights=random")
    able, reason = hub_access(HUB)
    advice = (
        "" if able else f"ask for access at https://huggingface.co/{HUB}, then `hf auth login`; or use weights=random"
    )
    return Fact(HUB, reason, able or None, advice)


def _project() -> list[Fact]:
    try:
        root = project_root()
        runs = runs_root(root)
    except UsageError as error:
        return [Fact("project", str(error), False)]
    has = (root / "notebooks").is_dir()
    facts = [Fact("project", str(root), has, "" if has else "run from the checkout, or set GRASS_ROOT to it")]
    existing = next(folder for folder in (runs, *runs.parents) if folder.exists())
    writable = os.access(existing, os.W_OK)
    facts.append(
        Fact("runs", str(runs), writable, "" if writable else "cannot be written; set GRASS_RUNS to another folder")
    )
    free = shutil.disk_usage(existing).free
    enough = free >= LITTLE_SPACE
    return [
        *facts,
        Fact("free disk", _gigabytes(free), enough, "" if enough else "free some, or set GRASS_RUNS elsewhere"),
    ]


def _slurm() -> Fact:
    from grass_lib.cluster.queue import call, require_slurm
    from grass_lib.cluster.settings import load_settings
    from grass_lib.runner.planning import experiments_by_name

    try:
        require_slurm()
    except UsageError:
        return Fact("Slurm", "no cluster here", None, "optional; --executor slurm works on a login node")
    try:
        load_settings(project_root(), (), experiments_by_name())
    except UsageError as error:
        return Fact("Slurm", str(error), False, "correct it; book/reproduce.md says what it may hold")
    try:
        call(["sinfo", "--noheader", "--format=%P"], seconds=SLURM_SECONDS)
    except GrassError as error:
        return Fact("Slurm", str(error), False, "--executor slurm does not work here until it answers")
    return Fact("Slurm", f"jobs can be submitted, submitit {_version('submitit')}", True)


def machine_facts() -> list[Fact]:
    """What there is on this machine: Python, packages, GPU, memory, disk, data."""
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    advice = "" if supported else "use Python 3.11 or 3.12"
    facts = [
        Fact("Python", platform.python_version(), supported, advice),
        Fact("CPU", f"{cpu_count()} cores, {_gigabytes(memory_bytes())} memory", True),
    ]
    facts += [*_torch(), *_project(), _data_folder(), _gated_model()]
    missing = [f"{name} ({use})" for name, use in NEEDED.items() if importlib.util.find_spec(name) is None]
    facts.append(
        Fact(
            "packages",
            f"missing: {', '.join(missing)}" if missing else "complete",
            not missing,
            "make setup" * bool(missing),
        )
    )
    facts += [*_kernel_packages(), _baselines()]
    return [*facts, _slurm()]


def verdicts(names: Sequence[str] = (), scales: Sequence[str] = ()) -> list[Verdict]:
    """Asks every experiment, at every scale, whether it would work here.

    Args:
        names: experiments, none for all.
        scales: scales, none for all.

    Returns:
        One verdict per experiment and scale.
    """
    from grass_lib.runner.parameters import read_parameters
    from grass_lib.runner.planning import check_experiment, check_names, experiments_by_name, template_path

    found = []
    for name in check_names(names):
        experiment = experiments_by_name()[name]
        try:
            read_parameters(template_path(project_root(), experiment))
            broken: list[str] = []
        except GrassError as error:
            broken = [str(error)]
        for scale in experiment.scales:
            if scales and scale not in scales:
                continue
            problems = [*broken, *check_experiment(experiment, scale)]
            found.append(Verdict(name, experiment.title, scale, tuple(problems)))
    return found
