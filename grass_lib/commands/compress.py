"""The commands ``grass store compress`` and ``grass store compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grass_lib.errors import StoreError, UsageError

if TYPE_CHECKING:
    from grass_lib.store import GradientStore

Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars.")]


def compress(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A finished store; it is kept.")],
    into: Annotated[Path, typer.Option("--into", help="Folder of the smaller store; a killed run goes on there.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, int8 or fp8; without, that of STORE.")] = "",
    rank: Annotated[
        int | None, typer.Option(help="Keep so many directions of each layer, and store their coefficients.")
    ] = None,
    worker: Annotated[
        str, typer.Option(metavar="I/N", help="Write only the shards that leave I modulo N, such as 0/3.")
    ] = "0/1",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Write the rows of a store again in fewer bytes; `grass attribute` takes the new store as it takes the old."""
    from grass_lib.attribution.compress import compress as compress_store
    from grass_lib.commands.store import parse_worker
    from grass_lib.experiments.base import resolve_device
    from grass_lib.store import GradientStore
    from grass_lib.store.formats import DTYPES

    number, count = parse_worker(worker)
    if dtype and dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    found = GradientStore.open(store)
    result = compress_store(
        found,
        into,
        dtype=dtype or None,
        rank=rank,
        device=resolve_device(device),
        worker=number,
        n_workers=count,
        progress=not quiet,
    )
    missing = len(result.missing())
    state = "complete" if not missing else f"{missing} of {result.n_shards} shards left to other workers"
    typer.echo(f"{into}: {result.stored_bytes:,} bytes, {state}; {store} has {found.stored_bytes:,} bytes")


def compare(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="A finished store, best of float32 rows.")],
    others: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores of the same gradients.")],
    queries: Annotated[int, typer.Option(help="How many training samples are asked, evenly spaced.")] = 64,
    damping: Annotated[float, typer.Option(help="Times the mean eigenvalue of the curvature.")] = 0.1,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each store.")] = False,
) -> None:
    """Bytes per sample, and how far scores keep their order; training samples are asked, and no model is needed."""
    import torch

    from grass_lib.bench.store_compare import check_same
    from grass_lib.bench.store_compare import compare as compare_stores
    from grass_lib.experiments.base import resolve_device
    from grass_lib.store import GradientStore

    first, stores = GradientStore.open(reference), [GradientStore.open(each) for each in others]
    for store in stores:
        check_same(first, store)
    for store in stores:
        found = compare_stores(
            first,
            store,
            queries=min(queries, first.n_samples),
            damping=damping,
            device=torch.device(resolve_device(device)),
        )
        if as_json:
            typer.echo(json.dumps({"store": str(store.path), **found.to_json()}))
            continue
        shared = f" and {found.shared_bytes:,} for directions that all share" if found.shared_bytes else ""
        kind = found.dtype if found.rank is None else f"rank {found.rank}, {found.dtype}"
        size = f"{found.bytes_per_sample:,.0f} bytes per sample ({found.ratio:.1f} times fewer){shared}"
        typer.echo(
            f"{store.path}: {kind}, {size}"
            f"; Spearman with {reference}: self-influence {found.self_influence:.4f}, scores {found.scores:.4f} "
            f"(lowest of {found.queries} queries {found.lowest:.4f})"
        )


def compression_parent(found: GradientStore) -> GradientStore:
    """The store that a store was compressed from.

    Raises:
        StoreError: It is not where it was, or is another one.
    """
    from grass_lib.store import GradientStore

    path = ((found.source or {}).get("compressed") or {}).get("parent")
    expected = found.manifest.fingerprint["compressed"]["parent"]
    remedy = f"put it back, or compress it again: grass store compress PARENT --into {found.path}"
    if path is None or not Path(path).is_dir():
        raise StoreError(f"{found.path} was compressed from {path or 'another store'}, which is not there; {remedy}")
    parent = GradientStore.open(path)
    if parent.manifest.digest != expected:
        raise StoreError(
            f"{found.path} was compressed from the store {expected}, and {path} holds {parent.manifest.digest}; "
            f"{remedy}"
        )
    return parent


def compress_again(parent: GradientStore, found: GradientStore, *, device: str, progress: bool) -> None:
    """Writes the missing shards of a store that was compressed."""
    from grass_lib.attribution.compress import compress as compress_store
    from grass_lib.experiments.base import resolve_device

    rank = found.manifest.low_rank["rank"] if found.manifest.low_rank else None
    compress_store(parent, found.path, dtype=found.dtype, rank=rank, device=resolve_device(device), progress=progress)
