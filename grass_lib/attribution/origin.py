"""The store of an influence function: where it is, what its rows come from, and whether it is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grass_lib import __version__
from grass_lib.attribution.caching import check_fits, default_shard_size, sample_bytes
from grass_lib.attribution.model_hash import model_sha256
from grass_lib.errors import StoreError, UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.maps import LayerMasks, LayerMatrices
from grass_lib.gradients.order import may_be_same
from grass_lib.gradients.outputs import output_name
from grass_lib.projection import Mask
from grass_lib.ranks import is_sharded
from grass_lib.store import GradientStore, MemoryStore, Store
from grass_lib.store.base import shard_list
from grass_lib.store.formats import parse_dtype
from grass_lib.store.manifest import Manifest
from grass_lib.store.place import store_folder
from grass_lib.store.store import MANIFEST

# Packages whose operators differ from this library's; its own give the same numbers everywhere.
_PACKAGES = ("sjlt", "fast_jl")
_LAST_BITS = ("deterministic", "compiled")
DATA_NOTES: tuple[str, str] = ("first_sample", "spread_samples")
"""What a store's provenance tells training sets apart by: hashes of the first sample, and of 64 of all."""
_ALWAYS_HASHED = 2**26  # bytes of a model whose hash takes no time


class KeptStore:
    """Makes, finds and checks the store that belongs to some gradients."""

    def __init__(
        self,
        gradients: FactoredGradients,
        *,
        path: str | Path | None,
        dtype: torch.dtype | str,
        shard_size: int | None,
        settings: Mapping[str, Any],
        masks: LayerMasks | None,
        matrices: LayerMatrices | None = None,
        given: Mapping[str, Any] | None,
        source: Mapping[str, Any] | None,
    ) -> None:
        """Checks the arguments; nothing is made.

        Args:
            gradients: Give the rows.
            path: The folder; None for memory.
            dtype: Of the stored numbers, see `grass_lib.store.formats`.
            shard_size: Samples per shard; None to choose.
            settings: What else decides the rows, as entries of the fingerprint.
            masks: By side.
            matrices: By side or layer, where they were given.
            given: Further entries, such as the hash of the data.
            source: What rebuilds the store.

        Raises:
            UsageError: One of them does not fit.
        """
        if shard_size is not None and shard_size < 1:
            raise UsageError(f"shard_size is {shard_size}; expected a positive number of samples")
        self._gradients = gradients
        self._path = None if path is None else store_folder(path)
        self._dtype, self._shard_size, self._source = parse_dtype(dtype), shard_size, source
        shapes = {name: f"{shape.kind} {shape.d_out}x{shape.d_in}" for name, shape in gradients.layers.items()}
        own = {
            "sparsification": str(gradients.spec.sparsification),
            "projection": str(gradients.spec.projection),
            "loss": output_name(gradients.loss),
            "include_head": gradients.include_head,
            "shapes": shapes,
            "masks": mask_fingerprints(masks),
            "operators": ", ".join(sorted({*gradients.backends.values()} & {*_PACKAGES})) or "grass_lib",
            "computed_in": str(gradients.dtype).removeprefix("torch."),
            **({"matrices": matrix_fingerprints(matrices)} if matrices else {}),
            # Only where it is so: stores from before the switch keep their fingerprints.
            **({"fp8": True} if gradients.fp8 else {}),
            **settings,
        }
        clash = sorted({"model", *own} & (given or {}).keys())
        if clash:
            raise UsageError(f"fingerprint has {', '.join(clash)}, which the store notes by itself; choose other names")
        self._entries = {**own, **(given or {})}
        self._store: GradientStore | MemoryStore | None = None
        self._data: dict[str, str] = {}
        self._seen_model: tuple[tuple[tuple[int, int], ...], str] = ((), "")

    def make(self, n_samples: int | None, batch: int, data: Mapping[str, str]) -> Store:
        """The store that is there, or a new one; in memory also where the data are others.

        Args:
            n_samples: Number of samples; None where only the store that is there can know it.
            batch: Size of the first batch.
            data: Hashes of samples, by `DATA_NOTES`; empty ones say nothing.

        Raises:
            UsageError: The number of samples is not known, or shards and batches do not fit.
            StoreError: The folder holds a store of something else.
        """
        there = self._found()
        other = None if there is None else _other_samples(there.manifest.provenance or {}, data)
        if there is not None and other is not None:
            if isinstance(there, GradientStore):
                raise StoreError(
                    f"{there.path} holds gradients of other training data: {other}; give another folder, or the data "
                    "that it was cached from (in the same order, padded alike, without random augmentation)"
                )
            there = self._store = None
        self._data = {name: text for name, text in data.items() if text}
        n_samples = there.n_samples if n_samples is None and there else n_samples
        if n_samples is None:
            raise UsageError("the loader does not say how many samples it has; give n_samples=")
        default = default_shard_size(batch, sample_bytes(self._gradients.sizes, self._dtype))
        shard_size = self._shard_size or (there.shard_size if there else default)
        whole = there is not None and not there.missing()
        if shard_size < n_samples and shard_size % batch and not whole:
            wanted = (
                "a batch size that divides it, since the store is there"
                if there
                else f"a shard_size that is a multiple of the batch size, for example {default}"
            )
            raise UsageError(f"shards of {shard_size} samples are cut within batches of {batch}; expected {wanted}")
        if not whole:
            sizes = self._gradients.sizes
            wanted = ", smaller batches or a smaller shard_size"
            check_fits(min(shard_size, n_samples), sizes, self._dtype, "a shard", wanted)
            if self._path is None:
                check_fits(n_samples, sizes, self._dtype, "the store in memory", ", or store= and a folder")
        store = self._store = self._opened(there, n_samples, shard_size, replace=True)
        return store

    def complete(self) -> Store:
        """The store, whole and of these gradients.

        Raises:
            UsageError: There is none, or shards are missing, or the model has changed.
            StoreError: The folder holds a store of something else.
        """
        there = self._found()
        if there is None:
            raise UsageError("the training gradients are not there yet; call cache(train_loader) first")
        # How rows were computed decides their last bits; that is for whoever adds some.
        settings = {name: there.fingerprint[name] for name in _LAST_BITS if name in there.fingerprint}
        store = self._store = self._opened(there, there.n_samples, there.shard_size, replace=False, settings=settings)
        missing = store.missing()
        if missing:
            raise UsageError(
                f"{len(missing)} of {store.n_shards} shards are missing ({shard_list(missing)}); call "
                "cache(train_loader), which computes only these, or merge the other workers' stores"
            )
        return store

    def _found(self) -> GradientStore | MemoryStore | None:
        if self._store is not None:
            return self._store
        return GradientStore.open(self._path) if self._path and (self._path / MANIFEST).exists() else None

    def _opened(
        self,
        there: GradientStore | MemoryStore | None,
        n_samples: int,
        shard_size: int,
        *,
        replace: bool,
        settings: Mapping[str, Any] | None = None,
    ) -> GradientStore | MemoryStore:
        """The store that is there, where it is of the present model and settings; in memory, another can replace it."""
        plan: dict[str, Any] = {
            "layers": self._gradients.sizes,
            "n_samples": n_samples,
            "shard_size": shard_size,
            "dtype": self._dtype,
            "fingerprint": {"model": self._model_sha256(), **self._entries, **(settings or {})},
            "source": self._source,
            "provenance": {
                "grass_lib": __version__,
                "torch": torch.__version__,
                "device": _device_name(self._gradients),
                **self._data,
            },
        }
        if isinstance(there, GradientStore) and (parent := there.manifest.parent()) is not None:
            # Rows that were compressed later are those of the store they come from.
            plan["dtype"] = parent.dtype
            Manifest.plan(**plan).refuse_other(parent, there.path)
            if replace and there.missing():
                raise UsageError(
                    f"{there.path} was compressed from another store, and {len(there.missing())} of {there.n_shards} "
                    "shards are missing; call compress, or `grass store compress`, again"
                )
            return there
        if self._path is not None:
            return GradientStore.create(self._path, **plan)
        fresh = MemoryStore(**plan)
        if there is None or (replace and there.manifest.digest != fresh.manifest.digest):
            return fresh
        fresh.manifest.refuse_other(there.manifest, "memory")
        return there

    def _model_sha256(self) -> str:
        """Of a large model hashed again only where a weight was replaced, or written to (not through ``.data``)."""
        model = self._gradients.model
        values = [*model.parameters(), *model.buffers()]
        versions = tuple((id(value), value._version) for value in values)
        # The hash of a sharded model is work that all ranks do together, and one of them may ask alone.
        small = not is_sharded(model) and sum(value.nbytes for value in values) <= _ALWAYS_HASHED
        if small or self._seen_model[0] != versions:
            self._seen_model = versions, model_sha256(model)
        return self._seen_model[1]


def mask_fingerprints(masks: LayerMasks | None) -> dict[str, str]:
    """Fingerprint of each mask, by side."""
    loaded = {name: Mask.load(mask) if isinstance(mask, str | Path) else mask for name, mask in (masks or {}).items()}
    return {name: loaded[name].fingerprint for name in sorted(loaded)}


def matrix_fingerprints(matrices: LayerMatrices) -> dict[str, str]:
    """SHA-256 of each given matrix in float64, by side or layer."""
    return {
        name: hashlib.sha256(matrices[name].detach().cpu().double().contiguous().numpy().data).hexdigest()
        for name in sorted(matrices)
    }


def _other_samples(noted: Mapping[str, str], data: Mapping[str, str]) -> str | None:
    """How the samples of a store and a loader are seen to differ; None where they may be the same."""
    first, spread = (
        bool(data.get(name)) and not may_be_same(noted.get(name, data[name]), data[name]) for name in DATA_NOTES
    )
    if first:
        return "its first sample is not the loader's"
    return "some of its samples are not the loader's" if spread else None


def _device_name(gradients: FactoredGradients) -> str:
    return torch.cuda.get_device_name(gradients.device) if gradients.device.type == "cuda" else gradients.device.type
