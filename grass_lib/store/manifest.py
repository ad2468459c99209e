"""What a gradient store is: its layers, samples and shards, and the fingerprint of what its rows come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import StoreError, UsageError
from grass_lib.rng import STREAM_VERSION
from grass_lib.store.entries import as_json, encoded, flat, sha256_of, short
from grass_lib.store.formats import (
    DTYPES,
    SCALE_BLOCK,
    SCALE_DTYPE,
    SCALED,
    Rows,
    dtype_name,
    parse_dtype,
    row_dtype,
    scale_count,
)

FORMAT = 1
SCALES = "::scale"
"""After a layer's name: the name of its scales in a shard."""
SOURCE_FIELDS = ("experiment", "scale", "parameters", "sparsification", "projection", "hessian", "seed", "dtype")
"""What a source has to say for the command line to compute rows again."""
_SHOWN = 20
_ABSENT = "(absent)"


@dataclass(frozen=True)
class Manifest:
    """The plan of a store. Everything but ``source`` and ``provenance`` is part of its identity.

    Attributes:
        layers: Features per layer, ``{name: k_l}``, in the order of the rows' files.
        n_samples: Number of samples.
        shard_size: Samples per shard; the last shard may have fewer.
        dtype: Of the stored numbers, one of ``formats.DTYPES``.
        fingerprint: What the rows come from, as JSON values.
        source: What would compute the rows again; None when nothing is known.
        provenance: Notes that change nothing, such as versions and the device.
        stream_version: Version of the random streams behind the rows.
        format: Version of the store's files.
        low_rank: Where rows are coefficients of a basis: the ``rank`` asked for, the ``features`` of each layer before,
            and the ``sha256`` of the file with the basis; ``layers`` then are numbers of coefficients.
    """

    layers: dict[str, int]
    n_samples: int
    shard_size: int = 1024
    dtype: torch.dtype = torch.float32
    fingerprint: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    stream_version: int = STREAM_VERSION
    format: int = FORMAT
    low_rank: dict[str, Any] | None = None

    @staticmethod
    def plan(
        *,
        layers: Mapping[str, int],
        n_samples: int,
        shard_size: int,
        dtype: torch.dtype | str,
        fingerprint: Mapping[str, Any],
        source: Mapping[str, Any] | None,
        provenance: Mapping[str, Any] | None,
        low_rank: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Checks the arguments of a store.

        Raises:
            UsageError: A size is no positive integer, a layer's name cannot be used, the dtype is not supported, or a
                mapping holds something else than JSON values.
        """
        if not layers:
            raise UsageError("a gradient store without layers; expected {layer name: number of features}")
        for name, size in layers.items():
            if not isinstance(name, str) or not name or name == "__metadata__" or name.endswith(SCALES):
                raise UsageError(f"layer name {name!r} cannot be used in a gradient store; expected the module's name")
            _positive(f"number of features of layer {name}", size)
        _positive("n_samples", n_samples)
        _positive("shard_size", shard_size)
        return Manifest(
            layers={name: int(size) for name, size in layers.items()},
            n_samples=int(n_samples),
            shard_size=int(shard_size),
            dtype=parse_dtype(dtype),
            fingerprint=as_json("fingerprint", fingerprint),
            source=None if source is None else as_json("source", source),
            provenance=None if provenance is None else as_json("provenance", provenance),
            low_rank=None if low_rank is None else as_json("low_rank", low_rank),
        )

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_samples // self.shard_size)

    @property
    def dtype_name(self) -> str:
        """The dtype as it is written."""
        return dtype_name(self.dtype)

    @property
    def row_dtype(self) -> torch.dtype:
        """Of rows before they are stored and when they are read."""
        return row_dtype(self.dtype)

    @property
    def features(self) -> dict[str, int]:
        """Features of the gradients per layer: those of ``layers``, unless rows are coefficients of a basis."""
        known = self.low_rank["features"] if self.low_rank else self.layers
        return {name: known[name] for name in self.layers}

    def tensors(self) -> list[tuple[str, torch.dtype, int]]:
        """Name, type and width of the tensors of a shard in file order: first all scales, where there are some.

        In this order every tensor starts at a multiple of its type's size, as readers may expect.
        """
        scales = [(f"{name}{SCALES}", SCALE_DTYPE, scale_count(k)) for name, k in self.layers.items()]
        return [*(scales if self.dtype in SCALED else []), *((name, self.dtype, k) for name, k in self.layers.items())]

    def parent(self) -> Manifest | None:
        """The plan of the store that this one was compressed from; None where it was computed itself."""
        made = self.fingerprint.get("compressed")
        if made is None:
            return None
        own = {name: value for name, value in self.fingerprint.items() if name != "compressed"}
        dtype, layers = DTYPES[made["dtype"]], self.features
        return replace(self, layers=layers, dtype=dtype, fingerprint=own, source=None, low_rank=None)

    @property
    def repairable(self) -> bool:
        """Whether `grass store repair` can compute rows again, from the source or from the parent of the store."""
        return self.parent() is not None or all(name in (self.source or {}) for name in SOURCE_FIELDS)

    def remedy(self, folder: Path, numbers: Sequence[int]) -> str:
        """How damaged shards are computed again.

        Args:
            folder: The store's folder.
            numbers: The shards.
        """
        shards = f"shard {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} shards"
        if self.repairable:
            return f"`grass store repair {folder}` computes only {shards} again"
        return (
            f"`grass store repair {folder}` removes what is damaged, and cache() of the object that made the store "
            "then computes only what is missing"
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that belongs to the store's identity, in hexadecimal."""
        return sha256_of(self._identity())

    def shard_rows(self, number: int) -> range:
        """Sample indices of one shard.

        Raises:
            UsageError: There is no such shard.
        """
        if not 0 <= number < self.n_shards:
            raise UsageError(f"shard {number} of a gradient store with shards 0 to {self.n_shards - 1}")
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.n_samples))

    def check_worker(self, worker: int, n_workers: int) -> None:
        """Raises a UsageError unless ``0 <= worker < n_workers``."""
        if not 0 <= worker < n_workers:
            raise UsageError(f"worker {worker} of {n_workers}; expected a number from 0 to n_workers - 1")

    def check_layers(self, layers: object) -> list[str]:
        """Names of the chosen layers in file order; all of them for None.

        Raises:
            UsageError: A layer is not in the store.
        """
        if layers is None:
            return list(self.layers)
        if isinstance(layers, str) or not hasattr(layers, "__iter__"):
            raise UsageError(f"layers={layers!r}; expected a list of layer names")
        chosen = set(layers)  # type: ignore[call-overload]
        unknown = sorted(map(str, chosen - set(self.layers)))
        if unknown:
            raise UsageError(f"no layer {', '.join(unknown)} in the gradient store; it has {', '.join(self.layers)}")
        return [name for name in self.layers if name in chosen]

    def check_tensors(self, number: int, tensors: Mapping[str, Tensor | Rows]) -> None:
        """Compares the rows of a shard with the plan.

        Raises:
            UsageError: Layers, shapes, the dtype or the device differ; both values are shown.
        """
        rows = len(self.shard_rows(number))
        missing = [name for name in self.layers if name not in tensors]
        unknown = [name for name in tensors if name not in self.layers]
        if missing or unknown:
            raise UsageError(
                f"shard {number}: {_counted(missing)} missing and {_counted(unknown)} not in the gradient store; "
                f"expected its {len(self.layers)} layers {_some(list(self.layers))}"
            )
        for name, size in self.layers.items():
            tensor, expected = tensors[name], self.row_dtype
            if isinstance(tensor, Rows):
                expected, scales, tensor = self.dtype, tensor.scales, tensor.codes
                shape = (rows, scale_count(size)) if expected in SCALED else None
                if (None if scales is None else tuple(scales.shape)) != shape:
                    found = "no scales" if scales is None else f"scales of shape {tuple(scales.shape)}"
                    raise UsageError(f"shard {number}, layer {name}: {found}, expected {shape or 'none'}")
            if tuple(tensor.shape) != (rows, size):
                raise UsageError(
                    f"shard {number}, layer {name}: rows of shape {tuple(tensor.shape)}, expected {(rows, size)}"
                )
            if tensor.dtype != expected or tensor.device.type != "cpu":
                raise UsageError(
                    f"shard {number}, layer {name}: {tensor.dtype} on {tensor.device.type}, expected {expected} on "
                    "cpu; convert the rows before they are written"
                )

    def to_bytes(self) -> bytes:
        """The manifest as it is written: the same bytes for the same content."""
        content = {**self._identity(), "digest": self.digest, "source": self.source, "provenance": self.provenance}
        return encoded({**content, "sha256": sha256_of(content)}, indent=1) + b"\n"

    @staticmethod
    def from_bytes(content: bytes, path: Path) -> Manifest:
        """Reads a manifest.

        Args:
            content: The file's bytes.
            path: The file, for messages.

        Raises:
            StoreError: The manifest is damaged or of another format.
        """
        remedy = "restore this file, or delete the folder and cache again"
        try:
            values = json.loads(content)
        except ValueError as error:
            raise StoreError(f"{path} is damaged: {error}; {remedy}") from error
        if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
            raise StoreError(
                f"{path} is of format {values['format']}, this version reads format {FORMAT}; use the version that "
                "wrote it, or another folder"
            )
        found = values.pop("sha256", None) if isinstance(values, dict) else None
        if not isinstance(values, dict) or found != sha256_of(values):
            raise StoreError(f"{path} is damaged or was changed: its content does not fit its checksum; {remedy}")
        return Manifest(
            layers={name: size for name, size in values["layers"]},
            n_samples=values["n_samples"],
            shard_size=values["shard_size"],
            dtype=_known_dtype(values["dtype"], path),
            fingerprint=values["fingerprint"],
            source=values["source"],
            provenance=values["provenance"],
            stream_version=values["stream_version"],
            format=values["format"],
            low_rank=values.get("low_rank"),
        )

    def refuse_other(self, found: Manifest, place: object) -> None:
        """Compares this plan with the store that is there.

        Args:
            found: The plan that was found.
            place: Where it was found, for the message.

        Raises:
            StoreError: They differ; each differing field is named with both values, nested ones with dots.
        """
        if found.digest == self.digest:
            return
        wanted, there = self._fields(), found._fields()
        names = [name for name in {**wanted, **there} if wanted.get(name, _ABSENT) != there.get(name, _ABSENT)]
        parts = [
            f"{name} is {short(there.get(name, _ABSENT))} there, {short(wanted.get(name, _ABSENT))} here"
            for name in names[:_SHOWN]
        ] or ["the layers are in another order"]
        if len(names) > _SHOWN:
            parts.append(f"and {len(names) - _SHOWN} more fields differ")
        raise StoreError(
            f"{place} holds a gradient store of another fingerprint: {'; '.join(parts)}; use another folder, or delete "
            "this one to cache again"
        )

    def _identity(self) -> dict[str, Any]:
        # Left out where they mean nothing, so that older stores keep their fingerprint.
        scaled = {"scale_block": SCALE_BLOCK} if self.dtype in SCALED else {}
        return {
            **scaled,
            **({"low_rank": self.low_rank} if self.low_rank else {}),
            "format": self.format,
            "stream_version": self.stream_version,
            "fingerprint": self.fingerprint,
            "layers": [[name, size] for name, size in self.layers.items()],
            "n_samples": self.n_samples,
            "shard_size": self.shard_size,
            "dtype": self.dtype_name,
        }

    def _fields(self) -> dict[str, Any]:
        """Flat names and values, the fingerprint first and the layers last, as a refusal lists them."""
        identity = self._identity()
        del identity["layers"]
        return {
            **flat("", identity.pop("fingerprint")),
            **flat("", identity),
            **{f"layers.{name}": size for name, size in self.layers.items()},
        }


def _positive(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{what} of a gradient store is {value!r}; expected a positive integer")


def _known_dtype(name: str, path: Path) -> torch.dtype:
    if name not in DTYPES:
        raise StoreError(
            f"{path} is of dtype {name}, this version reads {', '.join(DTYPES)}; use the version that wrote it"
        )
    return DTYPES[name]


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ... {names[-1]}"


def _counted(names: list[str]) -> str:
    return f"{len(names)} layers ({_some(names)})" if names else "none"
