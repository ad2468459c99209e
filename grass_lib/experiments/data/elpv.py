"""Solar cells (the package elpv-dataset, an extra of 91 MB): photographs of functional and of defective cells."""

from __future__ import annotations

import hashlib
import io
from importlib import metadata

import numpy as np

from grass_lib.errors import DataError
from grass_lib.experiments.data.sources import package_file
from grass_lib.rng import Stream

SIDE = 32
CLASSES = ("functional", "defective")
CREDIT = "Photographs: elpv-dataset (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), CC BY-NC-SA 4.0"
SOURCE = "elpv-dataset: solar cells that experts agree on, shrunk to 32x32"
PACKAGE, VERSION = "elpv-dataset", "1.0.0.post1"
_FOLDER = "elpv_dataset/data"
_LABELS_SHA256 = "0abe6fe7700aea571717d7d7dfec005a47c6207b4cde26a4556b6807a115483d"


def elpv_fingerprint() -> str:
    """A hash of the list of images and labels.

    Raises:
        DataError: The package is missing or the list has other content.
    """
    return hashlib.sha256(_list()).hexdigest()


def load_elpv(n_train: int, n_query: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cells that are surely functional or surely defective, in a fixed random order; grey repeated to three channels.

    Args:
        n_train: Training cells.
        n_query: Query cells; no cell is in both.

    Returns:
        Training images uint8 ``(n_train, 32, 32, 3)`` and labels int64 ``(n_train,)``, then those of the queries.

    Raises:
        DataError: The package is missing, a file has other content, or there are too few cells.
    """
    rows = [(name, float(probability)) for name, probability, _ in map(str.split, _list().decode().splitlines())]
    sure = [(name, int(probability)) for name, probability in rows if probability in (0.0, 1.0)]
    total = n_train + n_query
    if total > len(sure):
        raise DataError(f"{PACKAGE} has {len(sure)} cells with a sure label; expected {total} or more. Ask for fewer")
    order = Stream(0, "elpv", "order").permutation(len(sure)).tolist()[:total]
    images = np.stack([_pixels(package_file(PACKAGE, f"{_FOLDER}/{sure[place][0]}")) for place in order])
    labels = np.array([sure[place][1] for place in order], dtype=np.int64)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def _list() -> bytes:
    try:
        metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise DataError(
            f"data=elpv needs the package {PACKAGE}, not installed here; it is an extra of 91 MB under CC BY-NC-SA 4.0 "
            f"that `make setup` leaves out. Install it with `pip install {PACKAGE}=={VERSION}`, or leave data empty"
        ) from error
    return package_file(PACKAGE, f"{_FOLDER}/labels.csv", _LABELS_SHA256)


def _pixels(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        return np.asarray(small)
