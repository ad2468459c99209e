"""Reads GGUF files, the format of llama.cpp: metadata, and tensors back to float32 from their blocks of few bits.

Layout from the format's description (ggml-org/ggml, docs/gguf.md): a header with counts, key-value pairs, the places of
the tensors, then their data, all little-endian. Dimensions are stored innermost first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grass_lib.errors import DataError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _LIST = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LARGEST_TEXT = 1 << 30
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Layout:
    """How values of one type lie in a file.

    Attributes:
        name: Of the type.
        values: In a block.
        size: Bytes of a block.
        read: From ``(blocks, size)`` bytes to ``(blocks, values)`` float32.
    """

    name: str
    values: int
    size: int
    read: Callable[[Bytes], Any]


def _halves(block: Bytes, start: int) -> Any:
    """One float16 of each block, as ``(blocks, 1)`` float32."""
    return np.ascontiguousarray(block[:, start : start + 2]).view(np.float16).astype(np.float32)


def _nibbles(block: Bytes, start: int) -> Any:
    """Sixteen bytes of each block as 32 numbers from 0 to 15: low halves first, then high halves."""
    codes = block[:, start : start + 16]
    return np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)


def _bfloat16(block: Bytes) -> Any:
    return (np.ascontiguousarray(block).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


LAYOUTS = {
    0: Layout("F32", 1, 4, lambda block: np.ascontiguousarray(block).view(np.float32)),
    1: Layout("F16", 1, 2, lambda block: _halves(block, 0)),
    2: Layout("Q4_0", 32, 18, lambda block: (_nibbles(block, 2) - 8.0) * _halves(block, 0)),
    3: Layout("Q4_1", 32, 20, lambda block: _nibbles(block, 4) * _halves(block, 0) + _halves(block, 2)),
    8: Layout(
        "Q8_0",
        32,
        34,
        lambda block: np.ascontiguousarray(block[:, 2:]).view(np.int8).astype(np.float32) * _halves(block, 0),
    ),
    30: Layout("BF16", 1, 2, _bfloat16),
}
"""By the number of the type in the file; others are refused."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is.

    Attributes:
        shape: Outermost dimension first, as in PyTorch.
        layout: Of its values.
        offset: First byte in the file.
    """

    shape: tuple[int, ...]
    layout: Layout
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) // self.layout.values * self.layout.size


class GGUFFile:
    """An open file; tensors are read one by one.

    Attributes:
        path: The file.
        metadata: Values by key, such as ``llama.block_count``.
        places: Of the tensors, by name.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads everything but the tensors' data.

        Args:
            path: The file.

        Raises:
            DataError: It cannot be read, is no GGUF file, ends early or has a tensor of a type that is not known.
        """
        self.path = Path(path)
        try:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path.name} could not be read: {error}; expected a GGUF file") from error
        reader = _Reader(self._bytes, self.path.name)
        magic = bytes(reader.take(4))
        if magic != _MAGIC:
            raise DataError(
                f"{self.path.name} begins with {magic!r}; expected a GGUF file, which begins with {_MAGIC!r}"
            )
        version, n_tensors, n_values = reader.numbers("IQQ")
        if version not in _VERSIONS:
            raise DataError(f"{self.path.name} is of GGUF version {version}; expected one of {_VERSIONS}")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = reader.text()
            self.metadata[key] = reader.value(reader.numbers("I")[0])
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(n_tensors):
            name, (n_dims,) = reader.text(), reader.numbers("I")
            shape = tuple(reversed(reader.numbers(f"{n_dims}Q")))
            kind, offset = reader.numbers("IQ")
            found[name] = shape, kind, offset
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-reader.position // alignment) * alignment
        self.places = {name: self._place(name, *entry, start) for name, entry in found.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor as float32.

        Args:
            name: Its name in the file.

        Raises:
            DataError: There is none.
        """
        place = self.places.get(name)
        if place is None:
            raise DataError(
                f"{self.path.name} has no tensor {name!r}; it has {len(self.places)} others, such as "
                f"{next(iter(self.places), None)!r}"
            )
        blocks = self._bytes[place.offset : place.offset + place.size].reshape(-1, place.layout.size)
        return torch.from_numpy(np.asarray(place.layout.read(blocks), dtype=np.float32).reshape(place.shape).copy())

    def _place(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> Place:
        layout = LAYOUTS.get(kind)
        if layout is None:
            known = ", ".join(f"{number} ({each.name})" for number, each in LAYOUTS.items())
            raise DataError(f"{self.path.name}: tensor {name} is of type {kind}; expected one of {known}")
        if not shape or shape[-1] % layout.values:
            raise DataError(
                f"{self.path.name}: tensor {name} has shape {shape}, not whole blocks of {layout.values} values"
            )
        place = Place(shape, layout, start + offset)
        if place.offset + place.size > len(self._bytes):
            raise DataError(
                f"{self.path.name} has {len(self._bytes):,} bytes and tensor {name} ends at "
                f"{place.offset + place.size:,}; the file is not whole, install or fetch it again"
            )
        return place


class _Reader:
    """Takes values one after the other."""

    def __init__(self, content: Any, name: str) -> None:
        self._content, self._name, self.position = content, name, 0

    def take(self, size: int) -> Any:
        if size > _LARGEST_TEXT or self.position + size > len(self._content):
            raise DataError(f"{self._name} ends within its header; the file is not whole, install or fetch it again")
        part = self._content[self.position : self.position + size]
        self.position += size
        return part

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", bytes(self.take(struct.calcsize(f"<{form}"))))

    def text(self) -> str:
        return bytes(self.take(self.numbers("Q")[0])).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _LIST:
            inner, count = self.numbers("IQ")
            if inner in _SCALARS:
                return list(self.numbers(f"{count}{_SCALARS[inner]}"))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise DataError(f"{self._name} has a value of type {kind}; expected 0 to 12")
        return self.numbers(_SCALARS[kind])[0]
