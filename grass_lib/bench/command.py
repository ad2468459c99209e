"""The command ``grass bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure; prints a table and writes JSON.", no_args_is_help=True)


@app.command(help="Time every projection backend on the same inputs, checked against float64 (2 to 3 minutes).")
def projections(
    device: Annotated[str, typer.Option(help="auto, cuda or cpu")] = "auto",
    repeats: Annotated[int, typer.Option(help="timed calls a case, at least 20")] = 20,
    only: Annotated[str, typer.Option(help="one part: shapes, dtype, density or k")] = "",
    json: Annotated[Path, typer.Option(help="where the result is written")] = Path("runs/bench/projections.json"),
) -> None:
    """Runs `grass_lib.bench.projections.run` and shows its table and goals."""
    # Imported here, so that `grass --help` does not wait for torch.
    from grass_lib.bench.projections import run, summary, write

    result = run(device, repeats=repeats, only=only)
    write(result, json)
    typer.echo(summary(result))


@app.callback()
def bench() -> None:
    """Keeps ``projections`` a named sub-command while it is the only one."""
