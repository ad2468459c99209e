"""A second store from a finished one, with smaller rows: one-byte codes, coefficients of a few directions, or both.

The directions of a layer are the eigenvectors of its ``F = G^T G / n`` with the r largest eigenvalues, the right
singular vectors of all its rows. No other r directions lose less of the rows: the squared length that is lost, summed
over all samples, is n times the sum of the eigenvalues left out, and the share that is kept is noted in the basis.

Scores need no row back. With rows ``V c`` and ``C`` the matrix of the coefficients,

    g . (F + d I)^-1 . h  =  c . (C + d I)^-1 . V^T h,

so that queries are projected once and everything else happens among r coefficients. What scores lose are the terms of
the directions left out, at most ``1 / (s + d)`` times the two products each, with ``s`` their eigenvalues. The damping
stays relative to the mean eigenvalue of whole rows.

LoRIF (arXiv 2601.21929) has such a shared basis for the Hessian only, and stores a factorisation of each sample's
matrix. A basis that all samples share also serves rows that are no matrices any more, such as those behind an SJLT; a
sample whose gradient lies outside of it is lost where LoRIF would keep it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from grass_lib import __version__
from grass_lib.attribution.curvature import groups_within
from grass_lib.attribution.origin import DATA_NOTES
from grass_lib.attribution.preconditioner import decompose
from grass_lib.attribution.scoring import device_rows
from grass_lib.devices import usable_device
from grass_lib.errors import StoreError, UsageError
from grass_lib.precision import exact_products
from grass_lib.store import GradientStore
from grass_lib.store.base import shard_list
from grass_lib.store.basis import BASIS, StoreBasis, read_basis, write_basis
from grass_lib.store.formats import Rows, dtype_name, encode, parse_dtype
from grass_lib.store.lock import creation_lock
from grass_lib.store.shards import check_shard, explained
from grass_lib.store.store import MANIFEST

logger = logging.getLogger(__name__)

_SUMS_BYTES = 2**31


def compress(
    store: GradientStore | str | os.PathLike[str],
    into: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    rank: int | None = None,
    device: str | torch.device = "cpu",
    worker: int = 0,
    n_workers: int = 1,
    progress: bool = True,
) -> GradientStore:
    """Writes a store's rows again in fewer bytes; what an earlier, killed call has written stays.

    An influence function of the same model and settings can be asked with the new store as with the old one.

    Args:
        store: Finished, and not itself made by this function.
        into: Folder of the new store.
        dtype: Of the stored numbers; None for that of ``store``.
        rank: Directions that are kept of each layer (all of a layer with fewer features); None for the features
            themselves.
        device: Where to compute.
        worker: This worker's number: it writes the shards that leave ``worker`` modulo ``n_workers``.
        n_workers: Number of workers, which share the folder.
        progress: Shows a bar.

    Raises:
        UsageError: An argument does not fit, or there would be nothing to do.
        StoreError: The store is not finished or damaged, or the folder holds another store or cannot be written.
        GrassError: The curvature of a layer could not be decomposed.
    """
    source = store if isinstance(store, GradientStore) else GradientStore.open(store)
    target = source.dtype if dtype is None else parse_dtype(dtype)
    folder, place = Path(into), usable_device(device)
    _check(source, folder, target, rank, worker, n_workers)
    _check_content(source, range(source.n_shards) if rank else range(worker, source.n_shards, n_workers), progress)
    low_rank = None if rank is None else _low_rank(source, folder, rank, place, progress)
    made = {"parent": source.manifest.digest, "dtype": source.manifest.dtype_name}
    result = GradientStore.create(
        folder,
        layers=source.layers if low_rank is None else low_rank.pop("layers"),
        n_samples=source.n_samples,
        shard_size=source.shard_size,
        dtype=target,
        fingerprint={**source.fingerprint, "compressed": made},
        source=_source(source, target, rank),
        provenance={
            "grass_lib": __version__,
            "torch": torch.__version__,
            "device": place.type,
            **{name: text for name, text in (source.provenance or {}).items() if name in DATA_NOTES},
        },
        low_rank=low_rank,
    )
    missing = result.missing(worker, n_workers)
    with (
        tqdm(total=len(missing), desc="compress", unit="shard", disable=not progress, leave=False) as bar,
        result.writer(worker=worker, n_workers=n_workers) as writer,
        exact_products(),
    ):
        for number, shard in _shards(source, result, missing, place):
            writer.submit(number, shard)
            bar.update()
    return result


def _check(
    source: GradientStore, folder: Path, dtype: torch.dtype, rank: int | None, worker: int, n_workers: int
) -> None:
    if source.manifest.parent() is not None:
        raise UsageError(f"{source.path} was itself compressed from another store; compress that one")
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}; expected a positive number of directions")
    if rank is None and dtype == source.dtype:
        raise UsageError(
            f"{source.path} has {dtype_name(dtype)} rows already; expected another dtype, such as int8, or a rank"
        )
    if folder.resolve() == source.path.resolve():
        raise UsageError(f"{folder} is the store to compress; expected another folder, it is kept")
    source.manifest.check_worker(worker, n_workers)
    if missing := source.missing():
        raise StoreError(
            f"{len(missing)} of {source.n_shards} shards are missing in {source.path}: {shard_list(missing)}; compress "
            "a finished store"
        )


def _check_content(source: GradientStore, numbers: range, progress: bool) -> None:
    """Damage must not pass into a store where it would have a checksum of its own."""
    for number in tqdm(numbers, desc="verify", unit="shard", disable=not progress, leave=False):
        problem = check_shard(source.path, source.manifest, number)
        if problem is not None:
            raise StoreError(problem.message)


def _source(source: GradientStore, dtype: torch.dtype, rank: int | None) -> dict[str, Any] | None:
    """What would make the rows again; not part of the identity, so that folders may move."""
    made = {"parent": str(source.path.resolve()), "dtype": dtype_name(dtype), "rank": rank}
    return {**(source.source or {}), "compressed": made}


def _low_rank(source: GradientStore, folder: Path, rank: int, device: torch.device, progress: bool) -> dict[str, Any]:
    """The low-rank part of the manifest; its basis is in the folder, made by the first of the workers."""
    note = {"parent": source.manifest.digest, "rank": rank}
    with explained(folder / BASIS, 0):
        folder.mkdir(parents=True, exist_ok=True)
    with creation_lock(folder):
        content = _kept_basis(folder, note)
        if content is None:
            content = low_rank_basis(source, rank, device, note, progress=progress).to_bytes()
            with explained(folder / BASIS, len(content)):
                write_basis(folder, content)
    layers = {name: vectors.shape[1] for name, vectors in StoreBasis.from_bytes(content).vectors.items()}
    return {
        "layers": {name: layers[name] for name in source.layers},
        "rank": rank,
        "features": source.layers,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _kept_basis(folder: Path, note: dict[str, Any]) -> bytes | None:
    """Content of a basis that an earlier call or another worker made of the same rows; None where there is none."""
    if (folder / MANIFEST).exists():
        manifest = GradientStore.open(folder).manifest
        # Without, the manifest is that of another store, which is refused later with both values.
        if manifest.low_rank:
            return read_basis(folder, manifest.low_rank["sha256"])
    elif (folder / BASIS).exists():
        content = (folder / BASIS).read_bytes()
        if StoreBasis.from_bytes(content).note == note:
            return content
    return None


def low_rank_basis(
    store: GradientStore, rank: int, device: torch.device, note: dict[str, Any], *, progress: bool = False
) -> StoreBasis:
    """The ``rank`` main directions of each layer of a finished store, from one pass over its rows.

    Args:
        store: The store.
        rank: Directions at most; a layer has no more than its rows span.
        device: Where to compute.
        note: Kept with the basis.
        progress: Shows a bar.

    Raises:
        GrassError: A layer could not be decomposed.
        StoreError: A shard is missing, damaged or cannot be read.
    """
    vectors, means, kept = {}, {}, {}
    with tqdm(total=len(store.layers), desc="basis", unit="layer", disable=not progress, leave=False) as bar:
        for names in layer_groups(store):
            with exact_products():
                bases = decompose(store, names, None, device, solve=torch.float64, keep=torch.float32)
            for name, basis in bases.items():
                order = basis.values.argsort(descending=True)[:rank]
                chosen = basis.vectors[:, order].float().cpu()
                # A layer without any gradient keeps one direction of zeros, and so its place in the shards.
                vectors[name] = chosen if chosen.shape[1] else torch.zeros(store.layers[name], 1)
                means[name] = basis.mean
                total = basis.mean * store.layers[name]
                kept[name] = float(basis.values[order].sum()) / total if total else 1.0
                bar.update()
    return StoreBasis(vectors, means, kept, note)


def layer_groups(store: GradientStore) -> Iterator[list[str]]:
    """Layers whose sums fit 2 GiB together, so that rows of many layers are read in one pass."""
    sizes = store.layers
    return groups_within(sizes, lambda name: sizes[name] * min(sizes[name], store.n_samples) * 4, _SUMS_BYTES)


def _shards(
    source: GradientStore, result: GradientStore, numbers: list[int], device: torch.device
) -> Iterator[tuple[int, dict[str, Rows]]]:
    """The new rows of each shard, on the CPU."""
    basis, shard = result.basis, {}
    on_device = {name: part.to(device) for name, part in basis.vectors.items()} if basis else {}
    last = list(source.layers)[-1]
    for samples, name, rows in source.stream_rows(shards=numbers):
        parts = []
        for _, values in device_rows(rows, torch.float32, device):
            values = values @ on_device[name] if basis else values
            coded = encode(values, result.dtype)
            parts.append(Rows(*(tensor.cpu() for tensor in coded.tensors())))
        scales = [part.scales for part in parts if part.scales is not None]
        # Joined, and thereby copied even where there is one part, because the stream uses its memory again.
        shard[name] = Rows(torch.cat([part.codes for part in parts]), torch.cat(scales) if scales else None)
        if name == last:
            yield samples.start // source.shard_size, shard
            shard = {}
