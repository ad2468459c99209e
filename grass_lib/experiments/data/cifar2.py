"""CIFAR-2: the cats and dogs of CIFAR-10 (Krizhevsky), and what stands in for them at the embedded scale."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data import elpv, tiles
from grass_lib.experiments.data.sources import grass_data

SIZES = {"embedded": (200, 100), "paper": (5000, 500)}
"""Training and query images by scale."""
ROWS = {"train": 5000, "test": 1000}
"""Cats, and dogs, in the whole splits of CIFAR-10."""
HUB = "uoft-cs/cifar10"
CLASSES = ("cat", "dog")
CHOICES = {"embedded": ("", "elpv"), "paper": ("",)}
"""Data by scale: "" for the scale's own."""
CREDIT = "Images: CIFAR-10 (A. Krizhevsky, 2009), collected from the web"
_LABELS = (3, 5)
_SIDE = 32
_JPEG = b"\xff\xd8"


@dataclass(frozen=True, eq=False)
class Photos:
    """Images of two classes.

    Attributes:
        train_x: Pixels from -1 to 1 (mean and deviation 0.5 taken out), float32 ``(n_train, 3, 32, 32)``.
        train_y: Labels 0 and 1, int64 ``(n_train,)``.
        query_x: As ``train_x``, ``(n_query, 3, 32, 32)``.
        query_y: As ``train_y``, ``(n_query,)``.
        train_images: Pixels for display, uint8 ``(n_train, 32, 32, 3)``.
        query_images: Pixels for display, uint8 ``(n_query, 32, 32, 3)``.
        classes: Names of the two classes.
        source: Where the images come from, in words.
        credit: Who made them, and under which licence.
        kind: ``embedded``; ``official``; ``recompressed`` where the images went through JPEG; ``substitute`` where a
            file has not the cats and dogs of CIFAR-10 in their numbers.
        rows: Images used, training and queries together.
        sha256: Of the pixels that networks see and the labels, wherever they were read from.
    """

    train_x: Tensor
    train_y: Tensor
    query_x: Tensor
    query_y: Tensor
    train_images: Tensor
    query_images: Tensor
    classes: tuple[str, str]
    source: str
    credit: str
    kind: str
    rows: int
    sha256: str


@dataclass(frozen=True, eq=False)
class _Split:
    """The first images of one split: uint8 ``(n, 32, 32, 3)``, labels 0 and 1, and what their file is."""

    images: np.ndarray
    labels: np.ndarray
    lossless: bool = True
    complete: bool = True


def load_cifar2(scale: str, data: str = "") -> Photos:
    """The images of one scale.

    ``embedded``: tiles of scikit-learn's two photographs, or with ``data="elpv"`` solar cells. ``paper``: the first
    5,000 cats and dogs of the training split and the first 500 of the test split, from the folder ``GRASS_DATA`` where
    it is set, else from the hub. A folder may hold the hub's files or files of the same columns with the cats and dogs
    alone, in any lossless format or as JPEG.

    Args:
        scale: ``embedded`` or ``paper``.
        data: One of `CHOICES`.

    Raises:
        UsageError: There is no such scale or choice.
        DataError: The data are missing or damaged.
    """
    check_choice(scale, data)
    n_train, n_query = SIZES[scale]
    if scale == "embedded":
        if data == "elpv":
            return _photos(elpv.load_elpv(n_train, n_query), elpv.CLASSES, elpv.SOURCE, elpv.CREDIT, "embedded")
        train_tiles, train_y, query_tiles, query_y = tiles.load_tiles(n_train, n_query)
        seen = (tiles.without_colour(train_tiles), train_y, tiles.without_colour(query_tiles), query_y)
        shown = (train_tiles, query_tiles)
        return _photos(seen, tiles.CLASSES, tiles.SOURCE, tiles.CREDIT, "embedded", shown)
    folder = grass_data()
    train, query = _paper_split(folder, "train", n_train), _paper_split(folder, "test", n_query)
    kind, source = "official", f"{HUB} on the hub"
    if folder is not None:
        source = "GRASS_DATA/cifar2"
        if not (train.complete and query.complete):
            kind = "substitute"
        elif not (train.lossless and query.lossless):
            kind, source = "recompressed", f"{source}, compressed once more as JPEG"
    return _photos((train.images, train.labels, query.images, query.labels), CLASSES, source, CREDIT, kind)


def check_choice(scale: str, data: str = "") -> None:
    """Raises UsageError for a scale, or data at a scale, that there are not."""
    if scale not in SIZES:
        raise UsageError(f"scale is {scale!r}; expected one of {', '.join(SIZES)}")
    if data not in CHOICES[scale]:
        known = ", ".join(map(repr, CHOICES[scale]))
        raise UsageError(f"data is {data!r}; expected one of {known} at scale {scale}")


def data_problems(scale: str, data: str = "") -> list[str]:
    """What keeps the data of a scale from being read here, one sentence each; asks nothing of the network."""
    check_choice(scale, data)
    try:
        data_fingerprint(scale, data)
    except DataError as error:
        return [str(error)]
    if scale == "paper":
        needed = ("datasets", "PIL") if grass_data() is None else ("pyarrow", "PIL")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            return [f"reading CIFAR-10 needs {' and '.join(missing)}, not installed here; run `make setup`"]
        if grass_data() is None and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            return ["GRASS_DATA is not set and HF_HUB_OFFLINE is on; set GRASS_DATA to a folder with cifar2/*.parquet"]
    return []


def data_fingerprint(scale: str, data: str = "") -> str:
    """A hash of the files behind a scale, without decoding them; the hub's copy is fixed and has its name.

    Raises:
        UsageError: There is no such scale or choice.
        DataError: A file is missing.
    """
    check_choice(scale, data)
    if scale == "embedded":
        return elpv.elpv_fingerprint() if data == "elpv" else tiles.tiles_fingerprint()
    folder = grass_data()
    if folder is None:
        return f"hub:{HUB}"
    digest = hashlib.sha256()
    for split in ROWS:
        path = _parquet(folder, split)
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} could not be read: {error.strerror or error}; make it readable") from error
    return digest.hexdigest()


def _photos(
    parts: tuple[np.ndarray, ...],
    classes: tuple[str, str],
    source: str,
    credit: str,
    kind: str,
    shown: tuple[np.ndarray, np.ndarray] | None = None,
) -> Photos:
    """Photos of what networks see, ``parts``, and of what readers see where that is something else, ``shown``."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part, dtype=np.uint8).tobytes())
    train_images, train_labels, query_images, query_labels = (torch.from_numpy(part.copy()) for part in parts)
    for_readers = (train_images, query_images) if shown is None else (torch.from_numpy(part.copy()) for part in shown)
    train_shown, query_shown = for_readers
    return Photos(
        train_x=_normalised(train_images),
        train_y=train_labels,
        query_x=_normalised(query_images),
        query_y=query_labels,
        train_images=train_shown,
        query_images=query_shown,
        classes=classes,
        source=source,
        credit=credit,
        kind=kind,
        rows=len(train_labels) + len(query_labels),
        sha256=digest.hexdigest(),
    )


def _normalised(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def _paper_split(folder: Path | None, split: str, count: int) -> _Split:
    found = _hub_split(split, count) if folder is None else _parquet_split(_parquet(folder, split), split, count)
    shape = found.images.shape[1:]
    if shape != (_SIDE, _SIDE, 3):
        raise DataError(f"CIFAR-2, split {split}: images are {shape}; expected 32x32 in colour. Fetch the data again")
    return found


def _parquet(folder: Path, split: str) -> Path:
    path = folder / "cifar2" / f"{split}-00000-of-00001.parquet"
    if not path.is_file():
        raise DataError(
            f"GRASS_DATA has no file cifar2/{path.name}; expected train-00000-of-00001.parquet and "
            f"test-00000-of-00001.parquet of {HUB} on the hub (its folder plain_text). Put them there, or unset "
            "GRASS_DATA to use the hub"
        )
    return path


def _parquet_split(path: Path, split: str, count: int) -> _Split:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            "reading CIFAR-2 from GRASS_DATA needs pyarrow, not installed here; run `make setup`"
        ) from error
    try:
        file = ParquetFile(path)
        labels = file.read(columns=["label"])["label"].to_numpy()
        places = _places(labels, split, count)
        wanted, contents, first = set(places.tolist()), [], 0
        for batch in file.iter_batches(batch_size=1024, columns=["img"]):
            rows = batch.column("img").to_pylist()
            contents += [row["bytes"] for place, row in enumerate(rows, start=first) if place in wanted]
            first += len(rows)
            if len(contents) == count:
                break
        return _Split(
            images=_stack([_pixels(content) for content in contents]),
            labels=_binary(labels[places]),
            lossless=not any(content.startswith(_JPEG) for content in contents),
            complete=all(int((labels == label).sum()) == ROWS[split] for label in _LABELS),
        )
    except (ArrowException, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"GRASS_DATA's cifar2/{path.name} cannot be read ({' '.join(str(error).split())}); expected a parquet file "
            f"with the columns of {HUB} on the hub. Fetch it again"
        ) from error


def _hub_split(split: str, count: int) -> _Split:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("reading CIFAR-2 from the hub needs datasets, not installed here; run `make setup`") from error
    try:
        table: Any = load_dataset(HUB, split=split)
        labels = np.array(list(table["label"]))
        places = _places(labels, split, count)
        images = [np.asarray(row["img"].convert("RGB")) for row in table.select(places.tolist())]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-2 could not be read from the hub ({HUB}): {type(error).__name__}: {error}. Set GRASS_DATA to a "
            "folder that has cifar2/train-00000-of-00001.parquet and cifar2/test-00000-of-00001.parquet, or run with "
            "scale=embedded"
        ) from error
    return _Split(_stack(images), _binary(labels[places]))


def _places(labels: np.ndarray, split: str, count: int) -> np.ndarray:
    """Rows of the first cats and dogs, ascending."""
    places = np.flatnonzero(np.isin(labels, _LABELS))[:count]
    if len(places) < count:
        raise DataError(
            f"CIFAR-2, split {split}, has {len(places)} cats and dogs (labels 3 and 5); expected {count} or more. "
            "Fetch the data again"
        )
    return places


def _binary(labels: np.ndarray) -> np.ndarray:
    return (labels == _LABELS[1]).astype(np.int64)


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images of different sizes: {sorted(shapes)}")
    return np.stack(images)


def _pixels(content: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))
