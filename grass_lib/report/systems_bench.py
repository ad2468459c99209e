"""The page "Other systems: throughput and LDS": figures and tables drawn from the JSON of ``grass bench systems``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.bench.systems_plan import CLAIMED_AGAINST, SETTINGS
from grass_lib.errors import RecordError
from grass_lib.report.figure_files import FORMATS, figure_markdown, save_figure
from grass_lib.report.results import read_result
from grass_lib.report.style import NEUTRAL, figure_style
from grass_lib.words import faster

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES = {
    "gpt2": "GPT-2 small's shape, blocks of 512 tokens",
    "llama": "Llama-3.1-8B's shape, blocks of 1,024 tokens, the paper's protocol",
}
"""Shapes with a table of their own; the file is ``systems-SHAPE.json``."""
_OURS, _OTHERS = "#0072B2", "#D98C00"


def load_systems(folder: Path, shape: str) -> dict[str, Any] | None:
    """Reads a result; None where there is none.

    Args:
        folder: Usually ``book/measured``.
        shape: Key of `SHAPES`.

    Raises:
        RecordError: The file has no rows, or is of another compressed size than the page speaks of.
    """
    path = folder / f"systems-{shape}.json"
    return _of_shape(path, shape) if path.is_file() else None


def _of_shape(path: Path, shape: str) -> dict[str, Any]:
    command = f"grass bench systems --shape {shape}"
    found, k = read_result(path, "rows", command), SETTINGS[shape].k
    if found.get("k", k) != k:
        raise RecordError(f"{path.name} is of k = {found['k']}, expected {k}; run `{command}` again, without --k")
    return found


def load_earlier(folder: Path, shape: str) -> list[dict[str, Any]]:
    """Reads the earlier runs of a shape, on other machines or with other versions: ``systems-SHAPE_N.json``.

    Args:
        folder: Usually ``book/measured``.
        shape: Key of `SHAPES`.

    Returns:
        In the order of N.

    Raises:
        RecordError: A file has no rows, or is of another compressed size than the page speaks of.
    """
    numbered = {path: path.stem.rpartition("_")[2] for path in folder.glob(f"systems-{shape}_*.json")}
    paths = sorted((path for path, number in numbered.items() if number.isdecimal()), key=lambda p: int(numbered[p]))
    return [_of_shape(path, shape) for path in paths]


def systems_markdown(result: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]] = ()) -> str:
    """One result as MyST: where it was measured, the table, the best in throughput and in memory.

    Args:
        result: What ``grass bench systems`` wrote.
        earlier: Other runs, which get a line each.
    """
    rows = [row for row in result["rows"] if not row["error"]]
    libraries = ", ".join(f"{name} {version}" for name, version in sorted({(r["system"], r["version"]) for r in rows}))
    lines = [
        f"Measured with `{result['command']}` on {result['device']} ({result['date']}): {result['tokens']:,} tokens, "
        f"batches of {result['batch_size']} blocks of {result['length']:,},{_layers(rows)} "
        f"{result['warm_up']} warm-up batches, random weights, {result['model']['dtype']}. "
        f"PyTorch {result['versions']['torch']}; {libraries}.",
        "",
        "| system | tokens/s, one walk | tokens/s, ready to score | peak memory (GB) | stored (GB) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        if row["error"]:
            lines.append(f"| {row['label']} | failed: {_failure(row['error'])} | | | |")
            continue
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        lines.append(
            f"| {row['label']} | {row['tokens_per_second']:,.0f} | {row['tokens_per_second_ready']:,.0f} | {peak} "
            f"| {row['stored_bytes'] / 1e9:.3f} |"
        )
    curved = [row for row in rows if row["options"].get("hessian") not in ("none", "Identity")]
    if curved:
        fastest = max(curved, key=lambda row: row["tokens_per_second_ready"])
        lines += ["", f"Most tokens per second, ready to score with curvature: {fastest['label']}."]
        sized = [row for row in curved if row["peak_bytes"] is not None]
        if sized:
            lines[-1] += f" Least memory: {min(sized, key=lambda row: row['peak_bytes'])['label']}."
    missing = [label for label in result.get("planned", ()) if label not in {row["label"] for row in result["rows"]}]
    if missing:
        lines += ["", f"Not measured, because the run was stopped before: {'; '.join(missing)}."]
    if result.get("throughput_percent_faster") is not None:
        lines.append("")
        lines.append(
            f"Our FactGraSS is {faster(result['throughput_percent_faster'], CLAIMED_AGAINST)} of rank 64, both with "
            "curvature."
        )
    if earlier:
        lines += [
            "",
            "Earlier runs, with the code of then, ready to score; timings of different runs are of different machines "
            "and do not compare:",
            "",
            *map(_earlier_line, earlier),
        ]
    return "\n".join(lines) + "\n"


def _earlier_line(run: Mapping[str, Any]) -> str:
    speeds = [
        f"{row['label']} {row['tokens_per_second_ready']:,.0f} tokens/s" for row in run["rows"] if not row["error"]
    ]
    percent = run.get("throughput_percent_faster")
    found = "" if percent is None else f"; FactGraSS {faster(percent, CLAIMED_AGAINST)}"
    return f"- {run['device']}, {run['date']}: {'; '.join(speeds)}{found}."


def systems_figure(result: Mapping[str, Any]) -> Figure:
    """Tokens a second of every system: ready to score, and the one walk behind it; peak memory beside the bar."""
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if not row["error"]]
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(rows) + 1.3), layout="constrained")
        colours = [_OURS if row["system"] == "grass_lib" else _OTHERS for row in rows]
        places = range(len(rows))
        walks = [row["tokens_per_second"] for row in rows]
        axes.barh(places, walks, color=colours, alpha=0.35, height=0.7, linewidth=0)
        axes.barh(places, [row["tokens_per_second_ready"] for row in rows], color=colours, height=0.7, linewidth=0)
        edge = 1.02 * max(walks)
        for place, row in enumerate(rows):
            memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
            text = f"{row['tokens_per_second_ready']:,.0f}{memory}"
            axes.text(1.01 * edge, place, text, va="center", fontsize=8, color=NEUTRAL)
        axes.set_yticks(places, [row["label"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, edge)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens/s (pale: one walk)")
    return figure


def write_figures(measured: Path, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draws a figure for each shape that was measured.

    Args:
        measured: Folder with the JSON files.
        folder: Where to write.
        formats: Suffixes to write.

    Returns:
        The files written.
    """
    import matplotlib.pyplot as plt

    written: list[Path] = []
    for shape in SHAPES:
        found = load_systems(measured, shape)
        if found is None or not _drawn(found):
            continue
        figure = systems_figure(found)
        written += save_figure(figure, f"systems_{shape}", folder, formats)
        plt.close(figure)
    return written


def write_systems_parts(measured: Path, generated: Path) -> None:
    """Writes the generated part of the page for each shape; a note with the command where nothing is measured.

    Args:
        measured: ``book/measured``.
        generated: ``book/_generated``; figures go into ``figures/`` below it.
    """
    write_figures(measured, generated / "figures", ("svg",))
    for shape in SHAPES:
        found = load_systems(measured, shape)
        command = f"grass bench systems --shape {shape} --json book/measured/systems-{shape}.json"
        text = f"Not measured yet: `{command}` writes it, on a GPU.\n"
        if found is not None:
            text = systems_markdown(found, load_earlier(measured, shape))
        if found is not None and _drawn(found):
            caption = f"{(systems_figure.__doc__ or '').splitlines()[0]} {SHAPES[shape]}."
            text += f"\n{figure_markdown(f'systems_{shape}.svg', caption)}"
        (generated / f"systems_{shape}.md").write_text(text, encoding="utf-8")


def _drawn(result: Mapping[str, Any]) -> bool:
    return any(not row["error"] for row in result["rows"])


def _layers(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = {row["details"]["layers"] for row in rows if "layers" in row.get("details", {})}
    return f" {counts.pop()} layers," if len(counts) == 1 else ""


def _failure(error: str) -> str:
    """The last line of a worker's log, fit for a cell."""
    return error.strip().splitlines()[-1].replace("|", "/")[:120]
