"""The basis of a low-rank store: orthonormal directions of each layer, in a file beside the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import StoreError
from grass_lib.files import replacing

BASIS = "basis.safetensors"
_VECTORS, _MEAN, _KEPT, _NOTE = "::vectors", "::mean", "::kept", "grass_lib"


@dataclass(frozen=True)
class StoreBasis:
    """Directions that rows ``g`` of a layer were expressed in: what is stored are the coefficients ``V^T g``.

    Attributes:
        vectors: ``{layer: (k_l, r_l)}`` float32 with orthonormal columns.
        means: Mean eigenvalue ``tr(F_l) / k_l`` of the rows before, whole: what a relative damping multiplies.
        kept: Share of the squared length of all rows before that lies in the directions, between 0 and 1.
        note: What the basis was made from, as JSON values.
    """

    vectors: Mapping[str, Tensor]
    means: Mapping[str, float]
    kept: Mapping[str, float]
    note: Mapping[str, Any]

    def reduce(self, name: str, rows: Tensor) -> Tensor:
        """Coefficients ``(n, r_l)`` of gradients ``(n, k_l)`` of a layer, in their dtype and on their device."""
        return rows @ self.vectors[name].to(rows.device, rows.dtype)

    def expand(self, name: str, rows: Tensor) -> Tensor:
        """Gradients ``(n, k_l)`` that coefficients ``(n, r_l)`` of a layer stand for."""
        return rows @ self.vectors[name].to(rows.device, rows.dtype).mT

    def to_bytes(self) -> bytes:
        """The file: the same bytes for the same basis."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, vectors in self.vectors.items():
            tensors[name + _VECTORS] = vectors.detach().float().cpu().contiguous()
            tensors[name + _MEAN] = torch.tensor([self.means[name]], dtype=torch.float64)
            tensors[name + _KEPT] = torch.tensor([self.kept[name]], dtype=torch.float64)
        return save(tensors, metadata={_NOTE: json.dumps(dict(self.note), sort_keys=True)})

    @staticmethod
    def from_bytes(content: bytes) -> StoreBasis:
        """Reads a file's content, which is known to be whole."""
        from safetensors.torch import load

        length = int.from_bytes(content[:8], "little")
        note = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_NOTE])
        tensors = load(content)

        def those(suffix: str) -> dict[str, Tensor]:
            return {name.removesuffix(suffix): value for name, value in tensors.items() if name.endswith(suffix)}

        means, kept = ({name: float(value) for name, value in those(suffix).items()} for suffix in (_MEAN, _KEPT))
        return StoreBasis(those(_VECTORS), means, kept, note)


def write_basis(folder: Path, content: bytes) -> None:
    """Writes the file, whole or not at all."""
    path = folder / BASIS
    with replacing(path, path.with_name(f".{BASIS}.tmp")) as file:
        file.write(content)


def read_basis(folder: Path, sha256: str) -> bytes:
    """Content of the file.

    Raises:
        StoreError: It is missing, damaged, or cannot be read.
    """
    path = folder / BASIS
    remedy = "restore it, or delete the folder and compress the store's parent again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} could not be read: {error.strerror or error}; {remedy}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise StoreError(f"{path} is damaged: its SHA-256 is {found}, the manifest says {sha256}; {remedy}")
    return content
