"""The section on what capturing adds to a pass of a small model, drawn from the benchmark's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.bench.capture_goals import goals, judged_spec
from grass_lib.report.results import goal_table, read_result

RESULT = "capture.json"
NAMES = {
    "activations": "the passes alone: forward, backward to activations",
    "caching": "caching, {spec}",
    "training": "transformers' model with the gradients of all weights, not compiled",
}
_SHAPES = {"gpt2": "GPT-2 with 124 million weights"}

Result = Mapping[str, Any]


def capture_table(result: Result) -> str:
    """All rows as a Markdown table: speed, its share of the passes alone, memory and its share."""
    lines = [
        "| weights | step | tokens/s | speed beside the passes alone | peak memory | beside the passes alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    alone = {row["dtype"]: row for row in result["rows"] if row["step"] == "activations"}
    for row in result["rows"]:
        base = alone.get(row["dtype"], row)
        name = NAMES[row["step"]].format(spec=row["spec"].removesuffix("->identity"))
        share = f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}"
        if row["speed_share"] is not None:
            share = f"{row['speed_share']:.4f} ± {row['speed_share_half_width']:.4f}"
        memory = more = ""
        if row["peak_bytes"] is not None and base["peak_bytes"] is not None:
            memory, more = f"{row['peak_bytes'] / 1e9:.2f} GB", f"{row['peak_bytes'] / base['peak_bytes']:.3f}"
        if row is base:
            share, more = "", ""
        lines.append(f"| {row['dtype']} | {name} | {row['tokens_per_second']:,.0f} | {share} | {memory} | {more} |")
    return "\n".join(lines) + "\n"


def capture_section(measured: Path) -> str:
    """The section as Markdown; empty where nothing has been measured.

    Args:
        measured: Folder with the JSON file, usually ``book/measured``.

    Raises:
        RecordError: The file has no rows.
    """
    if not (measured / RESULT).is_file():
        return ""
    result = read_result(measured / RESULT, "rows", "grass bench capture --json PATH")
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    allocator = f", the allocator of memory set to `{result['allocator']}`" if result["allocator"] else ""
    recorded = result["compiled"] and result["device_type"] == "cuda"
    how = (
        "Steps are compiled and recorded as CUDA graphs, training excepted; ours copies kept columns on a stream of "
        "its own, beside the products. "
        if recorded
        else ""
    )
    judged = goals(result)
    of = f" Goals are those of {judged_spec(result).removesuffix('->identity')}." if judged else ""
    return (
        "## What capturing adds to a small model\n\n"
        "A small model's products are short in bfloat16, and what a capture adds beside them weighs more. "
        f"Measured on one {result['device']} in one run of `{result['command']}` ({result['date']}; {versions}): "
        f"{_SHAPES.get(result['shape'], result['shape'])}, random, batches of {result['batch']} sequences of "
        f"{result['block']} tokens{allocator}. {how}The loss is the same function in all rows. Caching and the passes "
        "alone are compared by turns, with intervals of 95 %, since a device that gets warm runs slower; tokens a "
        f"second are of other calls.{of}\n\n"
        f"{capture_table(result)}" + (f"\n{goal_table(judged)}" if judged else "")
    )


def write_capture_section(measured: Path, target: Path) -> Path:
    """Writes the section to ``capture.md``.

    Args:
        measured: Folder with the JSON file.
        target: ``book/_generated``.
    """
    target.mkdir(parents=True, exist_ok=True)
    path = target / "capture.md"
    path.write_text(capture_section(measured), encoding="utf-8")
    return path
