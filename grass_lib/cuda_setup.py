"""Builds the optional projection packages ``sjlt`` and ``fast_jl`` from source, where that can work (``make cuda``).

Both are published as source only and import torch in their ``setup.py``, so they are built without pip's isolation,
without its cache (a build made on a machine without a GPU has no kernels and would be reused silently) and one by one.
``fast_jl`` fixes its GPU architecture in ``setup.py`` to one that CUDA 13 no longer compiles; the line is rewritten to
the GPU's own. Everywhere else this explains what is missing and changes nothing: no part of the library needs them.
"""

import argparse
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from grass_lib.errors import GrassError

logger = logging.getLogger(__name__)

PACKAGES = ("sjlt==0.1.7", "fast_jl==0.1.3")
_ARCHITECTURE = re.compile(r"""(TORCH_CUDA_ARCH_LIST['"]\]\s*=\s*)(['"])[^'"]*\2""")


def missing_for_build() -> str | None:
    """Says why the packages cannot be built here, or None where they can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed; run `make setup` first"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install a CUDA build of torch first"
    if not torch.cuda.is_available():
        return "torch sees no GPU; run this on the machine that has one"
    if cuda_home() is None:
        return "nvcc was not found; install the CUDA toolkit, or name its folder in CUDA_HOME"
    return None


def cuda_home() -> Path | None:
    """The CUDA toolkit's folder: ``CUDA_HOME``, else the customary place, else where ``nvcc`` lies; None if absent."""
    named = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc")
    candidates = [Path(named)] if named else []
    candidates.append(Path("/usr/local/cuda"))
    if found:
        candidates.append(Path(found).resolve().parent.parent)
    return next((home for home in candidates if (home / "bin" / "nvcc").exists()), None)


def fetch_sources(folder: Path, sources: Path | None) -> list[Path]:
    """Unpacks the source archives into ``folder``.

    Args:
        folder: An empty folder to unpack into.
        sources: A folder that already holds the two ``.tar.gz`` files (for machines without a network); None
            downloads them.

    Returns:
        One unpacked source folder a package, in the order of `PACKAGES`.

    Raises:
        GrassError: An archive is missing or cannot be downloaded.
    """
    if sources is None:
        sources = folder / "archives"
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
        for package in PACKAGES:
            command = [*pip, "--no-binary", ":all:", "-d", str(sources), package]
            if subprocess.run(command, env=_environment(), check=False).returncode != 0:
                raise GrassError(
                    f"pip could not download the source of {package}; see its message above, or save the archive in a "
                    "folder and name that folder with --sources"
                )
    unpacked = []
    for package in PACKAGES:
        name = package.replace("==", "-")
        archive = sources / f"{name}.tar.gz"
        if not archive.is_file():
            raise GrassError(f"{archive.name} is not in {sources}; save the source archive of {package} there")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        unpacked.append(folder / name)
    return unpacked


def use_architecture(setup_file: Path, architecture: str) -> bool:
    """Rewrites the fixed ``TORCH_CUDA_ARCH_LIST`` of a ``setup.py`` to ``architecture`` (``9.0``); True if found."""
    text, count = _ARCHITECTURE.subn(rf"\g<1>\g<2>{architecture}\g<2>", setup_file.read_text(encoding="utf-8"))
    if count:
        setup_file.write_text(text, encoding="utf-8")
    return count > 0


def build(sources: Path | None = None, target: Path | None = None) -> None:
    """Builds and installs both packages for the GPU of this machine; takes about 2 to 4 minutes.

    Args:
        sources: As in `fetch_sources`.
        target: Folder to install into; None installs into the running environment.

    Raises:
        GrassError: A download or a build failed.
    """
    import torch

    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}"
    with tempfile.TemporaryDirectory(prefix="grass-cuda-") as temporary:
        for package, source in zip(PACKAGES, fetch_sources(Path(temporary), sources), strict=True):
            use_architecture(source / "setup.py", architecture)
            logger.info("building %s for compute capability %s ...", package, architecture)
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-build-isolation",
                "--no-deps",
                "--no-cache-dir",
            ]
            command += ["--no-index", *(["--target", str(target)] if target else []), str(source)]
            if subprocess.run(command, env=_environment(), check=False).returncode != 0:
                raise GrassError(
                    f"building {package} failed; the compiler's message is above. It needs setuptools, wheel and ninja "
                    "in the environment and an nvcc that fits torch's CUDA. Everything else works without it."
                )


def _environment() -> dict[str, str]:
    home = cuda_home()
    return {**os.environ, **({"CUDA_HOME": str(home)} if home else {})}


def main(arguments: list[str] | None = None) -> int:
    """Runs ``make cuda``; returns its exit code: 0 when built or nothing to build for, 1 when a build failed."""
    parser = argparse.ArgumentParser(
        prog="python -m grass_lib.cuda_setup", description="Builds the optional packages sjlt and fast_jl."
    )
    parser.add_argument(
        "--sources", type=Path, help="folder with both source archives, for a machine without a network"
    )
    parser.add_argument("--target", type=Path, help="folder to install into instead of the running environment")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reason = missing_for_build()
    if reason:
        logger.info(
            "sjlt and fast_jl were not built: %s.\nNothing needs them: every projection has a path of its own.", reason
        )
        return 0
    try:
        build(options.sources, options.target)
    except GrassError as error:
        logger.error("%s", error)
        return error.exit_code
    logger.info('sjlt and fast_jl are installed; name them with backend="sjlt" and backend="fast_jl".')
    return 0


if __name__ == "__main__":
    sys.exit(main())
