"""Tiles of the two colour photographs that come with scikit-learn: a small task of two textures.

Queries come from the right quarter of each photograph, training tiles from the rest; no pixel is in two tiles. Colour
and brightness tell the two photographs apart so well that no training tile matters: networks are shown tiles without
them, readers see the photographs as they are.
"""

from __future__ import annotations

import hashlib
import io

import numpy as np

from grass_lib.errors import DataError
from grass_lib.experiments.data.sources import package_file
from grass_lib.rng import Stream

SIDE = 32
CLASSES = ("palace", "flower")
CREDIT = (
    "Photographs: china.jpg by danielbuechele and flower.jpg by vultilion on flickr, CC BY 2.0, as they come with "
    "scikit-learn"
)
SOURCE = "scikit-learn: china.jpg and flower.jpg cut into grey tiles of 32x32, a texture task"
_PACKAGE = "scikit-learn"
# Grey levels: the middle, the deviation that every tile is brought to, and what is added to a tile's own so that plain
# sky stays plain.
_MIDDLE, _CONTRAST, _FLOOR = 128.0, 48.0, 4.0
_FILES = (
    (
        "sklearn/datasets/images/china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    ),
    (
        "sklearn/datasets/images/flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    ),
)


def tiles_fingerprint() -> str:
    """A hash of the two files.

    Raises:
        DataError: The package is missing or a file has other content.
    """
    digest = hashlib.sha256()
    for path, sha256 in _FILES:
        digest.update(package_file(_PACKAGE, path, sha256))
    return digest.hexdigest()


def load_tiles(n_train: int, n_query: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tiles in a fixed random order, about as many of either photograph.

    Args:
        n_train: From the left three quarters, at most 390.
        n_query: From the right quarter, at most 130.

    Returns:
        Training images uint8 ``(n_train, 32, 32, 3)`` and labels int64 ``(n_train,)``, then those of the queries.

    Raises:
        DataError: The package is missing, a file has other content, or there are too few tiles.
    """
    train, query = [], []
    for path, sha256 in _FILES:
        photograph = _pixels(package_file(_PACKAGE, path, sha256))
        border = photograph.shape[1] * 3 // 4
        train.append(_cut(photograph[:, :border]))
        query.append(_cut(photograph[:, border:]))
    return *_mix(train, n_train, "train"), *_mix(query, n_query, "query")


def without_colour(images: np.ndarray) -> np.ndarray:
    """What the networks see: grey, repeated to three channels, each tile with its own mean and contrast taken out.

    Args:
        images: uint8 ``(n, 32, 32, 3)``.

    Returns:
        uint8 of the same shape.
    """
    grey = images.astype(np.float64).mean(axis=3, keepdims=True)
    mean, deviation = grey.mean(axis=(1, 2), keepdims=True), grey.std(axis=(1, 2), keepdims=True)
    level = (grey - mean) / (deviation + _FLOOR) * _CONTRAST + _MIDDLE
    return np.clip(np.rint(level), 0, 255).astype(np.uint8).repeat(3, axis=3)


def _pixels(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def _cut(photograph: np.ndarray) -> np.ndarray:
    """All tiles ``(n, 32, 32, 3)`` of an image ``(height, width, 3)``, row by row."""
    windows = np.lib.stride_tricks.sliding_window_view(photograph, (SIDE, SIDE), axis=(0, 1))
    return windows[::SIDE, ::SIDE].transpose(0, 1, 3, 4, 2).reshape(-1, SIDE, SIDE, 3)


def _mix(parts: list[np.ndarray], count: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    if count > len(labels):
        raise DataError(f"there are {len(labels)} {name} tiles; expected {count} or more. Ask for fewer")
    order = Stream(0, f"tiles/{name}", "order").permutation(len(labels)).numpy()[:count]
    return np.concatenate(parts)[order], labels[order]
