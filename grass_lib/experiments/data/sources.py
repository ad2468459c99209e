"""Where data sets are found: the folder ``GRASS_DATA``, files inside installed packages, the hub."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

from grass_lib.errors import DataError


def grass_data() -> Path | None:
    """The folder of full-scale data.

    Returns:
        The folder that the environment variable ``GRASS_DATA`` names; None where the variable is not set.

    Raises:
        DataError: The variable names something that is not a folder.
    """
    named = os.environ.get("GRASS_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"GRASS_DATA is {named!r}, which is not a folder; expected a folder laid out as the hub's files. "
            "Correct the variable, or unset it to use the hub"
        )
    return folder


def package_file(package: str, path: str, sha256: str | None = None) -> bytes:
    """A data file inside an installed package, which is not imported.

    Args:
        package: Name of the distribution.
        path: Of the file inside it.
        sha256: What its content must be; None for a file that is named by one whose content is known.

    Raises:
        DataError: The package or the file is missing, or the file has other content.
    """
    try:
        file = Path(str(metadata.distribution(package).locate_file(path)))
        content = file.read_bytes()
    except (metadata.PackageNotFoundError, OSError) as error:
        raise DataError(
            f"the embedded data file {path} of the package {package} was not found ({type(error).__name__}); install "
            f"it with `pip install {package}`, or run `make setup`"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{path} of the package {package} has SHA-256 {found}, expected {sha256}; install the version of {package} "
            "that requirements.txt names"
        )
    return content
