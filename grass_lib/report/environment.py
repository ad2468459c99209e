"""Facts about where a run happened: device, versions, source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grass_lib.errors import GrassError
from grass_lib.project import package_folder

PACKAGES = (
    "grass-lib",
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "datasets",
    "transformers",
    "papermill",
    "nbclient",
    "ipykernel",
    "mlxtend",
    "sjlt",
    "fast_jl",
)


def loaded_torch() -> Any | None:
    """Torch if the program has imported it; these facts alone are no reason to spend seconds on importing it."""
    return sys.modules.get("torch")


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the installed packages that can change a number."""
    where = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "platform": where, **installed(PACKAGES)}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _command(*words: str, cwd: Path | None = None) -> str | None:
    """First line of a command's output, or None where the command is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [None])[0] if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of this machine in bytes, or of its control group where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def device_facts(device: str | None = None) -> dict[str, Any]:
    """What a run computed on.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``; None or ``auto`` means the GPU where torch is loaded and sees one.

    Returns:
        ``type``, ``name``, ``memory_bytes``, ``driver`` (null on a CPU), and ``cores`` on a CPU or ``cuda`` on a GPU.
    """
    torch = loaded_torch()
    wants_gpu = device in (None, "auto") or str(device).startswith("cuda")
    if wants_gpu and torch is not None and torch.cuda.is_available():
        index = torch.device(device).index if device not in (None, "auto") else None
        properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": int(properties.total_memory),
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    facts = {"type": "cpu", "name": _cpu_name(), "memory_bytes": memory_bytes(), "driver": None}
    return {**facts, "cores": cpu_count()}


def peak_host_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def git_commit(root: Path) -> str | None:
    """Commit of the checkout at ``root``, or None outside of one."""
    return _command("git", "rev-parse", "HEAD", cwd=root) if (root / ".git").exists() else None


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".json") and path.is_file())


def _digest(paths: Iterable[Path], base: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(base).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def source_hash(template_sha256: str = "") -> str:
    """SHA-256 over the source of the whole package and a template.

    Args:
        template_sha256: hash of the template, empty for none.
    """
    package = package_folder()
    return hashlib.sha256(f"{_digest(_sources(package), package)}\0{template_sha256}".encode()).hexdigest()


def module_hashes(modules: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the source of modules, found without importing them.

    Args:
        modules: dotted names such as ``grass_lib.rng``; a package counts with everything below it.

    Returns:
        Hash by name.

    Raises:
        GrassError: a name that is neither a module nor a package of this library.
    """
    base = package_folder().parent
    hashes = {}
    for name in modules:
        folder = base.joinpath(*name.split("."))
        file = folder.with_suffix(".py")
        sources = [file] if file.is_file() else _sources(folder)
        if not sources:
            raise GrassError(f"module {name!r} has no source in the package; correct the experiment's list of modules")
        hashes[name] = _digest(sources, base)
    return hashes


def template_hash(template: Path) -> str:
    """SHA-256 of what a notebook says: kind, tags and source of its cells, not its outputs, counts or identifiers.

    Args:
        template: path of a notebook.

    Raises:
        GrassError: the file is not a notebook.
    """
    try:
        notebook = json.loads(template.read_text(encoding="utf-8"))
        cells = [
            [cell["cell_type"], cell.get("metadata", {}).get("tags", []), "".join(cell["source"])]
            for cell in notebook["cells"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrassError(
            f"notebooks/{template.name} is not a readable notebook ({type(error).__name__}); restore it"
        ) from error
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()
