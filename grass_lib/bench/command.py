"""The command ``grass bench``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from grass_lib.errors import UsageError
from grass_lib.files import check_output
from grass_lib.project import runs_root


def _output(path: Path | None, name: str) -> Path:
    """The file that was named, checked before anything is measured, or the usual one."""
    check_output(path, makes_folder=True)
    return path or runs_root() / "bench" / f"{name}.json"


app = typer.Typer(help="Measure; prints a table and writes JSON.", no_args_is_help=True)


@app.command(help="Time every projection backend on the same inputs, checked against float64 (2 to 3 minutes).")
def projections(
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    repeats: Annotated[int, typer.Option(help="timed calls a case, at least 20")] = 20,
    only: Annotated[str, typer.Option(help="one part: shapes, dtype, density or k")] = "",
    json: Annotated[Path | None, typer.Option(help="where the result goes; runs/bench/projections.json")] = None,
) -> None:
    """Runs `grass_lib.bench.projections.run` and shows its table and goals."""
    # Imported here, so that `grass --help` does not wait for torch.
    from grass_lib.bench.projections import run, summary
    from grass_lib.bench.results import write

    out = _output(json, "projections")
    result = run(device, repeats=repeats, only=only)
    write(result, out)
    typer.echo(summary(result))


@app.command(help="Tokens a second and memory of caching a language model's gradients, checked (8 minutes on an H100).")
def throughput(
    model: Annotated[
        str, typer.Option(help="llama-3.1-8b, llama-3.1-70b, smollm2-135m, tiny, a model of the hub, or a folder")
    ] = "llama-3.1-8b",
    weights: Annotated[str, typer.Option(help="random, or pretrained for a model of the hub or a folder")] = "random",
    dtype: Annotated[str, typer.Option(help="of the weights: bfloat16, float16 or float32")] = "bfloat16",
    spec: Annotated[str, typer.Option(help="the compression of interest")] = "random_mask-128*128->sjlt-4096",
    other: Annotated[str, typer.Option(help="another beside it, '' for none")] = "normal-64*64->identity",
    batch: Annotated[str, typer.Option(help="sequences in a step, several with commas")] = "4,8",
    block: Annotated[int, typer.Option(help="tokens in a sequence")] = 1024,
    samples: Annotated[int, typer.Option(help="sequences that each caching row writes")] = 256,
    steps: Annotated[int, typer.Option(help="timed steps of the other rows")] = 8,
    fp8: Annotated[bool, typer.Option("--fp8", help="rows with FP8 products as well, last")] = False,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    folder: Annotated[
        Path | None, typer.Option(help="where stores are written for a while; runs/bench/throughput")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="where the result goes; runs/bench/throughput.json")] = None,
) -> None:
    """Runs `grass_lib.bench.throughput_run.run` and shows its table and goals."""
    from grass_lib.bench.throughput_run import run, summary

    try:
        batches = [int(word) for word in batch.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--batch is {batch!r}; expected whole numbers with commas between them, such as 4,8"
        ) from error
    result = run(
        model,
        weights=weights,
        dtype=dtype,
        spec=spec,
        other=other,
        batches=batches,
        block=block,
        samples=samples,
        steps=steps,
        device=device,
        folder=folder or runs_root() / "bench" / "throughput",
        fp8=fp8,
        out=_output(json, "throughput"),
    )
    typer.echo(summary(result))


@app.command(help="What capturing adds to a pass of GPT-2's shape: speed and memory (5 minutes on an H100).")
def capture(
    shape: Annotated[str, typer.Option(help="gpt2 (a GPU) or tiny (any CPU)")] = "gpt2",
    dtypes: Annotated[str, typer.Option(help="of the weights, with commas between them")] = "bfloat16,float32",
    spec: Annotated[str, typer.Option(help="the compression of interest")] = "random_mask-128*128->sjlt-4096",
    other: Annotated[str, typer.Option(help="another beside it, '' for none")] = "normal-64*64->identity",
    batch: Annotated[int, typer.Option(help="sequences in a step; 0 for the shape's own")] = 0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="compiled and recorded passes")] = True,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    json: Annotated[Path | None, typer.Option(help="where the result goes; runs/bench/capture.json")] = None,
) -> None:
    """Runs `grass_lib.bench.capture.run` and shows its table and goals."""
    from grass_lib.bench.capture import run, summary

    result = run(
        shape,
        dtypes=[word.strip() for word in dtypes.split(",") if word.strip()],
        specs=[spec, *([other] if other else [])],
        batch=batch,
        compiled=compiled,
        device=device,
        out=_output(json, "capture"),
    )
    typer.echo(summary(result))


@app.command(help="Caching with LogIX, dattri, bergson and grass_lib on one model's shape: tokens/s, memory, bytes.")
def systems(
    shape: Annotated[str, typer.Option(help="tiny (any CPU), gpt2 or llama (a GPU)")] = "gpt2",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    only: Annotated[str, typer.Option("--systems", help="with commas between them; all without")] = "",
    tokens: Annotated[int, typer.Option(help="of the training set; 0 for the shape's own")] = 0,
    k: Annotated[int, typer.Option(help="compressed size of a layer, a square; 0 for the shape's own")] = 0,
    repeats: Annotated[int, typer.Option(help="how often each is measured, in turn")] = 1,
    python: Annotated[Path | None, typer.Option(help="a Python that has the systems, if not .venv-baselines")] = None,
    json: Annotated[Path | None, typer.Option(help="where the result goes; runs/bench/systems-SHAPE.json")] = None,
) -> None:
    """Runs `grass_lib.bench.systems.run` and shows its table."""
    from grass_lib.bench.systems import file_stem, run, summary

    out = _output(json, file_stem(shape, k))
    result = run(shape, device=device, systems=only, tokens=tokens, k=k, repeats=repeats, python=python, out=out)
    typer.echo(summary(result))


@app.command(help="One GPU and two: caching, curvature, sharded weights and a killed rank (6 minutes on two H100s).")
def scaling(
    shape: Annotated[str, typer.Option(help="llama (two GPUs) or tiny (any CPU)")] = "llama",
    rows: Annotated[int, typer.Option(help="sequences that are cached; 0 for the shape's own")] = 0,
    batch: Annotated[int, typer.Option(help="sequences in a step; 0 for the shape's own")] = 0,
    parts: Annotated[str, typer.Option(help="with commas between them")] = "caching,curvature,fsdp,kill",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    folder: Annotated[Path | None, typer.Option(help="where stores are written for a while")] = None,
    json: Annotated[Path | None, typer.Option(help="where the result goes; runs/bench/scaling.json")] = None,
) -> None:
    """Runs `grass_lib.bench.scaling.run` and shows its table and goals."""
    from grass_lib.bench.scaling import run, summary

    # Launches take minutes: each says when it starts and ends.
    logging.getLogger("grass_lib.bench.scaling").setLevel(logging.INFO)
    words = [word.strip() for word in parts.split(",") if word.strip()]
    result = run(shape, rows=rows, batch=batch, parts=words, device=device, folder=folder, out=_output(json, "scaling"))
    typer.echo(summary(result))


@app.callback()
def bench() -> None:
    """Measurements."""
