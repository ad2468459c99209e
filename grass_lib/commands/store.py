"""The command ``grass store``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from grass_lib.commands.compress import compare, compress
from grass_lib.commands.slurm import NoWait, SlurmOptions, cache_on_slurm, slurm_settings
from grass_lib.errors import StoreError, UsageError

app = typer.Typer(help="Gradient stores: cache, look at, check, mend, put together.", no_args_is_help=True)
app.command()(compress)
app.command()(compare)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars.")]


@app.command()
def info(
    store: StorePath,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a store holds, how far it is, and what it was cached from."""
    from grass_lib.store import GradientStore

    found = GradientStore.open(store)
    missing = found.missing()
    value = {
        "samples": found.n_samples,
        "shards": found.n_shards,
        "missing": missing,
        "shard_size": found.shard_size,
        "layers": len(found.layers),
        "k": sum(found.layers.values()),
        "features": sum(found.features.values()),
        "dtype": found.manifest.dtype_name,
        "rank": found.manifest.low_rank["rank"] if found.manifest.low_rank else None,
        "stored_bytes": found.stored_bytes,
        "source": found.source,
        "fingerprint": found.fingerprint,
    }
    if as_json:
        typer.echo(json.dumps(value, indent=1))
        return
    state = "complete" if not missing else f"{len(missing)} of {found.n_shards} shards missing"
    shards = f"{found.n_shards} shard{'' if found.n_shards == 1 else 's'}"
    typer.echo(f"{found.n_samples:,} samples in {shards} of {found.shard_size:,}: {state}")
    typer.echo(f"{len(found.layers)} layers, k = {value['k']:,} in all, {value['dtype']}, {found.stored_bytes:,} bytes")
    if "include_head" in found.fingerprint:
        head = "among them" if found.fingerprint["include_head"] else "not among them"
        typer.echo(f"output layer of a language model: {head}")
    if value["rank"]:
        typer.echo(f"rank {value['rank']}: coefficients in place of k = {value['features']:,} in all")
    source = found.source or {}
    if "compressed" in source:
        typer.echo(f"compressed from {source['compressed']['parent']}")
    for name in ("experiment", "scale", "sparsification", "projection", "hessian", "seed"):
        if name in source:
            typer.echo(f"{name}: {source[name]}")


@app.command()
def verify(store: StorePath, quiet: Quiet = False) -> None:
    """Read every shard and compare it with its checksum; exit 1 if something is missing or damaged."""
    from grass_lib.store import GradientStore

    found = GradientStore.open(store)
    problems = found.verify(progress=not quiet)
    for problem in problems:
        typer.echo(f"shard {problem.number}: {problem.kind}: {problem.message}")
    if problems:
        raise StoreError(
            f"{len(problems)} of {found.n_shards} shards are not as they should be; "
            f"{found.manifest.remedy(store, [problem.number for problem in problems])}"
        )
    typer.echo(f"all {found.n_shards} shards are as they were written")


@app.command()
def repair(store: StorePath, device: Device = "auto", quiet: Quiet = False) -> None:
    """Compute missing and damaged shards again, and only these.

    Those of a store that `grass store compress` made come from its parent. A store made from Python does not say what
    it was cached from: its damaged shards are removed, and cache() of the object that made it computes them. The exit
    code is 1 then, since the store is not whole yet.
    """
    from grass_lib.commands.compress import compress_again, compression_parent
    from grass_lib.commands.tasks import StoreSource, influence_of
    from grass_lib.store import GradientStore

    found = GradientStore.open(store)
    problems = found.verify(progress=not quiet)
    if not problems:
        typer.echo(f"all {found.n_shards} shards are as they were written; nothing to do")
        return
    compressed = found.manifest.parent() is not None
    source = StoreSource.of_store(found) if found.manifest.repairable and not compressed else None
    parent = compression_parent(found) if compressed else None
    again = parent is not None or source is not None
    for problem in problems:
        typer.echo(f"shard {problem.number}: {problem.kind}")
        # What cannot be read now may be whole; it goes only where it can be computed at once.
        if problem.kind == "damaged" or (again and problem.kind != "missing"):
            found.drop(problem.number)
    if parent is not None:
        compress_again(parent, found, device=device, progress=not quiet)
    elif source is not None:
        task, influence = influence_of(source, store, shard_size=found.shard_size, device=device, progress=not quiet)
        influence.cache(task.train, n_samples=task.n_train)
    else:
        unreadable = [str(problem.number) for problem in problems if problem.kind not in ("missing", "damaged")]
        kept = f"shards {', '.join(unreadable)} cannot be read and were left as they are; " if unreadable else ""
        raise StoreError(
            f"{store} does not say what it was cached from, so {len(problems) - len(unreadable)} of {found.n_shards} "
            f"shards are missing now; {kept}call cache() of the object that made it, which computes only these"
        )
    typer.echo(f"computed {len(problems)} of {found.n_shards} shards again")


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores of the same settings.")],
    into: Annotated[Path, typer.Option("--into", help="Folder of the whole store.")],
) -> None:
    """Put the shards of several workers' stores into one folder."""
    from grass_lib.store import GradientStore

    result = GradientStore.merge(list(sources), into)
    typer.echo(f"{into}: {result.n_shards} shards, {result.stored_bytes:,} bytes")


@app.command()
def cache(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Such as gpt2_wikitext.")],
    store: Annotated[Path, typer.Option("--store", help="Folder of the store; a killed run goes on there.")],
    scale: Annotated[str, typer.Option(help="embedded or paper")] = "embedded",
    sparsification: Annotated[str, typer.Option(metavar="TYPE-DIM*DIM", help="Stage 1.")] = "random_mask-16*16",
    projection: Annotated[str, typer.Option(metavar="TYPE-DIM", help="Stage 2.")] = "identity",
    hessian: Annotated[str, typer.Option(help="eFIM or Identity")] = "eFIM",
    parameters: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="A parameter of the notebook.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the stored rows: float32, bfloat16, float16, int8 or fp8.")
    ] = "bfloat16",
    masks: Annotated[
        str, typer.Option(help="How selective masks are chosen: random, energy or learned (without: learned).")
    ] = "",
    worker: Annotated[
        str, typer.Option(metavar="I/N", help="Write only the shards that leave I modulo N, such as 0/3.")
    ] = "0/1",
    shard_size: Annotated[
        int | None,
        typer.Option(help="Samples in a shard, a multiple of the batch size; the largest up to 1,024 and 256 MiB."),
    ] = None,
    device: Device = "auto",
    executor: Annotated[
        str, typer.Option(help="local, or slurm: --workers jobs and a check, see `grass jobs`.")
    ] = "local",
    workers: Annotated[int | None, typer.Option(help="With --executor slurm: how many jobs share the work.")] = None,
    slurm: SlurmOptions = None,
    no_wait: NoWait = False,
    quiet: Quiet = False,
) -> None:
    """Compute the compressed gradients of an experiment's training data.

    On several GPUs of one machine: torchrun --nproc-per-node N -m grass_lib store cache ...
    """
    from grass_lib.commands.tasks import check_folder, influence_of, planned_source
    from grass_lib.experiments.base import resolve_device
    from grass_lib.ranks import started_by_torchrun
    from grass_lib.runner.parameters import split_assignments
    from grass_lib.store import GradientStore

    number, count = parse_worker(worker)
    check_workers(executor, worker, workers)
    settings = slurm_settings(executor, slurm or (), no_wait)
    source = planned_source(
        experiment,
        scale,
        split_assignments(parameters or ()),
        sparsification=sparsification,
        projection=projection,
        hessian=hessian,
        seed=seed,
        dtype=dtype,
        masks=masks,
        here=settings is None,
    )
    if shard_size is not None and shard_size < 1:
        raise UsageError(f"--shard-size is {shard_size}; expected at least 1")
    check_folder(source, store)
    if settings is not None:
        words = ["store", "cache", experiment, "--store", str(store.resolve()), "--scale", scale, "--seed", str(seed)]
        words += ["--sparsification", sparsification, "--projection", projection, "--hessian", hessian]
        words += ["--dtype", dtype, "--device", device, "-q", *(["--masks", masks] if masks else [])]
        words += ["--shard-size", str(shard_size)] if shard_size is not None else []
        words += [word for text in parameters or () for word in ("-p", text)]
        cache_on_slurm(words, store, workers or 1, settings, experiment=experiment, scale=scale, wait=not no_wait)
        return
    with started_by_torchrun(resolve_device(device)) as (ranks, place):
        task, influence = influence_of(
            source, store, shard_size=shard_size, device=place, ranks=ranks, progress=not quiet
        )
        influence.cache(task.train, n_samples=task.n_train, worker=number, n_workers=count)
    if ranks.rank:
        return
    found = GradientStore.open(store)
    missing = len(found.missing())
    state = "complete" if not missing else f"{missing} of {found.n_shards} shards left to other workers"
    typer.echo(f"{store}: {found.n_samples:,} samples, {found.stored_bytes:,} bytes, {state}")


def check_workers(executor: str, worker: str, workers: int | None) -> None:
    """Checks who is to share the work of filling a store.

    Raises:
        UsageError: An unknown executor, or numbers that mean nothing with this one.
    """
    if executor not in ("local", "slurm"):
        raise UsageError(f"--executor is {executor!r}, expected local or slurm")
    if executor == "local" and workers is not None:
        raise UsageError(f"--workers {workers} needs --executor slurm; here, start one command per --worker i/n")
    if executor == "slurm" and worker != "0/1":
        raise UsageError(f"--worker {worker} is one worker, expected --workers N with --executor slurm")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, expected a whole number >= 1")


def parse_worker(text: str) -> tuple[int, int]:
    """Reads ``i/n``: worker i of n, counted from 0.

    Raises:
        UsageError: It is something else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"--worker is {text!r}; expected i/n with i from 0 to n - 1, such as 0/3, 1/3 and 2/3")
    return int(match[1]), int(match[2])
