"""The page "Throughput of other systems": tables drawn from the JSON of ``grass bench systems``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.report.results import read_result

SHAPES = {
    "gpt2": "GPT-2 small's shape, blocks of 512 tokens",
    "llama": "Llama-3.1-8B's shape, blocks of 1,024 tokens, the paper's protocol",
}
"""Shapes with a table of their own; the file is ``systems-SHAPE.json``."""


def load_systems(folder: Path, shape: str) -> dict[str, Any] | None:
    """Reads a result; None where there is none.

    Args:
        folder: Usually ``book/measured``.
        shape: Key of `SHAPES`.

    Raises:
        RecordError: The file has no rows.
    """
    path = folder / f"systems-{shape}.json"
    if not path.is_file():
        return None
    return read_result(path, "rows", f"grass bench systems --shape {shape}")


def systems_markdown(result: Mapping[str, Any]) -> str:
    """One result as MyST: where it was measured, the table, the best in throughput and in memory.

    Args:
        result: What ``grass bench systems`` wrote.
    """
    rows = [row for row in result["rows"] if not row["error"]]
    libraries = ", ".join(f"{name} {version}" for name, version in sorted({(r["system"], r["version"]) for r in rows}))
    lines = [
        f"Measured with `{result['command']}` on {result['device']} ({result['date']}): {result['tokens']:,} tokens, "
        f"batches of {result['batch_size']} blocks, {result['warm_up']} warm-up batches, random weights, "
        f"{result['model']['dtype']}. PyTorch {result['versions']['torch']}; {libraries}.",
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
            f"Our FactGraSS is {result['throughput_percent_faster']:.0f} % faster than LogIX's LoGra of rank 64, both "
            "with curvature."
        )
    return "\n".join(lines) + "\n"


def write_systems_parts(measured: Path, generated: Path) -> None:
    """Writes the generated part of the page for each shape; a note with the command where nothing is measured.

    Args:
        measured: ``book/measured``.
        generated: ``book/_generated``.
    """
    for shape in SHAPES:
        found = load_systems(measured, shape)
        command = f"grass bench systems --shape {shape} --json book/measured/systems-{shape}.json"
        text = f"Not measured yet: `{command}` writes it, on a GPU.\n" if found is None else systems_markdown(found)
        (generated / f"systems_{shape}.md").write_text(text, encoding="utf-8")


def _failure(error: str) -> str:
    """The last line of a worker's log, fit for a cell."""
    return error.strip().splitlines()[-1].replace("|", "/")[:120]
