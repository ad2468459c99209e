"""Mask files: the coordinates that a selective mask keeps, with where they come from and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.files import write_whole


@dataclass(frozen=True, eq=False)
class Mask:
    """Kept coordinates.

    Attributes:
        indices: int64 ``(k,)``, ascending, distinct, each in [0, p).
        p: Number of coordinates that were chosen from.
        scores: Optional ``(k,)`` floating tensor: how much each kept coordinate mattered to the choice.
        provenance: How the mask was made: method, model and data hashes, seed, ...

    Raises:
        UsageError: The fields break the above.
    """

    indices: Tensor
    p: int
    scores: Tensor | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        indices = self.indices
        if isinstance(self.p, bool) or not isinstance(self.p, int) or self.p < 1:
            raise UsageError(f"mask p is {self.p!r}; expected an int of 1 or more")
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            seen = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise UsageError(f"mask indices are {seen}; expected an int64 tensor of shape (k,)")
        if indices.numel() == 0:
            raise UsageError("the mask keeps no coordinate; expected at least one index")
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.p:
            raise UsageError(f"mask indices run from {low} to {high}; expected 0 to {self.p - 1} (p is {self.p})")
        if bool((indices[1:] <= indices[:-1]).any()):
            where = int((indices[1:] <= indices[:-1]).nonzero()[0, 0])
            raise UsageError(
                f"mask indices are not ascending and distinct: {int(indices[where])} is followed by "
                f"{int(indices[where + 1])} at position {where}; sort them and remove duplicates"
            )
        scores = self.scores
        if scores is not None and (scores.shape != indices.shape or not scores.dtype.is_floating_point):
            raise UsageError(f"mask scores are {scores.dtype} {tuple(scores.shape)}; expected floats ({len(indices)},)")
        for key, value in self.provenance.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise UsageError(f"mask provenance has {key!r}: {value!r}; expected strings")

    @property
    def k(self) -> int:
        """Number of kept coordinates."""
        return self.indices.numel()

    @property
    def fingerprint(self) -> str:
        """sha256 over p and the indices, in hex: two masks that keep the same coordinates are equal."""
        digest = hashlib.sha256(f"grass mask 1 p={self.p} k={self.k}\n".encode("ascii"))
        digest.update(self.indices.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Args:
            path: The file; its folder must exist.

        Raises:
            UsageError: The folder does not exist.
            GrassError: The file could not be written; what was there before is untouched.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise UsageError(
                f"cannot write the mask {path.name!r}: the folder {path.parent} does not exist; make it first"
            )
        tensors = {"indices": self.indices.cpu().contiguous()}
        if self.scores is not None:
            tensors["scores"] = self.scores.cpu().contiguous()
        metadata = {
            "p": str(self.p),
            "fingerprint": self.fingerprint,
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
        }
        write_whole(path, save(tensors, metadata), "mask file", then="save the mask again")

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Reads a file written by `save` and checks its fingerprint.

        Args:
            path: The file.

        Returns:
            The mask, on the CPU.

        Raises:
            UsageError: The file is missing, is no mask file, or does not match its fingerprint.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"mask file {str(path)!r} does not exist; make one with Mask.save, or correct the path")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = set(file.keys())
                tensors = {name: file.get_tensor(name) for name in ("indices", "scores") if name in names}
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{path.name} is not a readable safetensors file ({error}); expected a mask file"
            ) from error
        missing = [name for name in ("p", "fingerprint", "provenance") if name not in metadata]
        if missing or "indices" not in tensors:
            raise UsageError(
                f"{path.name} is no mask file: it lacks {', '.join([*missing, *({'indices'} - set(tensors))])}; "
                "write it with Mask.save"
            )
        try:
            p, provenance = int(metadata["p"]), json.loads(metadata["provenance"])
        except ValueError as error:
            raise UsageError(f"{path.name} has unreadable metadata ({error}); write it again with Mask.save") from error
        if not isinstance(provenance, dict):
            raise UsageError(f"{path.name} has a provenance of type {type(provenance).__name__}; expected an object")
        mask = cls(tensors["indices"], p, tensors.get("scores"), provenance)
        if mask.fingerprint != metadata["fingerprint"]:
            raise UsageError(
                f"{path.name} is damaged or was edited: its indices have fingerprint {mask.fingerprint}, and the file "
                f"says {metadata['fingerprint']}; make the mask again"
            )
        return mask

    def check(self, k: int, p: int, provenance: Mapping[str, str] | None = None) -> None:
        """Checks that the mask is the one that a spec and a model need.

        Args:
            k: Number of coordinates that the spec keeps.
            p: Number of coordinates of the input.
            provenance: Entries that must be there with these values; None checks nothing.

        Raises:
            UsageError: Something differs; both values are shown.
        """
        if self.k != k:
            raise UsageError(f"the mask keeps {self.k} coordinates, and the spec needs {k}; use the mask made for it")
        if self.p != p:
            raise UsageError(f"the mask was made for p={self.p} coordinates, and the input has p={p}; make one for it")
        for key, value in (provenance or {}).items():
            if self.provenance.get(key) != value:
                raise UsageError(
                    f"the mask's provenance has {key}={self.provenance.get(key)!r}, and {value!r} was expected; "
                    "make the mask again for this model and data"
                )
