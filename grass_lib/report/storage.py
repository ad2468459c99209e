"""The page "What would a billion tokens take?": rows of every format measured, and disk and hours by arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.report import throughput
from grass_lib.report.plan import TOKENS, linear_layers, plan_rows
from grass_lib.report.results import read_result

RESULT = "store_formats.json"
MODELS = ("llama-3.1-8b", "llama-3.1-70b")
PLANNED: tuple[tuple[str, int | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("int8", None),
    ("fp8", None),
    ("bfloat16", 4),
    ("bfloat16", 16),
    ("int8", 16),
    ("bfloat16", 64),
)
"""Stored type and, for coefficients, how many times more features than directions there are."""
_STUB = "Not measured yet: `python benchmarks/store_formats.py` writes it, on a CPU in a few minutes.\n"

Result = Mapping[str, Any]


def load(folder: Path) -> dict[str, Any]:
    """Reads the benchmark of the formats.

    Args:
        folder: Usually ``book/measured``.

    Raises:
        RecordError: It is missing, not readable or has no rows.
    """
    return read_result(folder / RESULT, "rows", "python benchmarks/store_formats.py")


def format_name(dtype: str, rank: int | str | None) -> str:
    """A format in words."""
    return dtype if rank is None else f"rank {rank}, {dtype}"


def formats_table(result: Result, damping: float) -> str:
    """Bytes per sample and rank correlation with float32 rows at one damping, as a Markdown table; means over seeds.

    Args:
        result: Of the benchmark.
        damping: One of those that were measured.
    """
    rows = [row for row in result["rows"] if row["damping"] == damping]
    whole = next(row["bytes_per_sample"] for row in rows if row["dtype"] == "float32" and row["rank"] is None)
    lines = [
        "| rows | bytes per sample | times fewer | scores | lowest query | self-influence | same ten best |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype, rank in dict.fromkeys((row["dtype"], row["rank"]) for row in rows):
        same = [row for row in rows if (row["dtype"], row["rank"]) == (dtype, rank)]
        mean = {name: sum(row[name] for row in same) / len(same) for name in ("scores", "self_influence", "same_top10")}
        lowest, size = min(row["scores_lowest"] for row in same), same[0]["bytes_per_sample"]
        lines.append(
            f"| {format_name(dtype, rank)} | {size:,.0f} | {whole / size:.1f} | {mean['scores']:.4f} | {lowest:.4f} | "
            f"{mean['self_influence']:.4f} | {mean['same_top10']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def formats_text(result: Result) -> str:
    """How it was measured, and one table for each damping."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    sizes, seeds = sorted(set(result["layers"].values())), len(result["seeds"])
    parts = [
        f"Measured in one run of `{result['command']}` on a CPU ({result['date']}; {versions}): {result['model']}, "
        f"{result['samples']:,} training blocks, {result['queries']} queries, {len(result['layers'])} layers of "
        f"{', '.join(f'{size:,}' for size in sizes)} features (`{result['sparsification']}`, `{result['projection']}`)"
        f", {seeds} seed{'s' if seeds > 1 else ''} of the compression. *Scores* and *self-influence* are Spearman's "
        "rank correlations over training blocks with those of float32 rows, the mean over queries and seeds; *lowest "
        "query* is the lowest of any query and seed.\n"
    ]
    for damping in dict.fromkeys(row["damping"] for row in result["rows"]):
        parts += [f"At a damping of {damping:g}:\n", formats_table(result, damping)]
    return "\n".join(parts)


def disk_rows(block: int, per_layer: int) -> list[dict[str, Any]]:
    """Bytes for a billion tokens, by format and model.

    Args:
        block: Tokens in a passage.
        per_layer: Features of a layer.

    Returns:
        ``{dtype, rank, model, layers, per_passage, rows, basis}``, the last three in bytes.
    """
    from grass_lib.store.formats import DTYPES, row_bytes

    found = []
    for dtype, share in PLANNED:
        rank = None if share is None else per_layer // share
        for model in MODELS:
            layers = linear_layers(model)
            one = layers * row_bytes(per_layer if rank is None else rank, DTYPES[dtype])
            basis = 0 if rank is None else layers * per_layer * rank * 4
            sizes = {"per_passage": one, "rows": TOKENS // block * one, "basis": basis}
            found.append({"dtype": dtype, "rank": rank, "model": model, "layers": layers, **sizes})
    return found


def disk_text(block: int, per_layer: int) -> str:
    """`disk_rows` as a sentence and a Markdown table."""
    rows = disk_rows(block, per_layer)
    layers = {row["model"]: row["layers"] for row in rows}
    lines = [
        f"A passage has {block:,} tokens, so that a billion tokens are {TOKENS // block:,} passages; a layer has "
        f"{per_layer:,} features; all linear layers and the output layer are stored, "
        f"{' and '.join(f'{count} in {name}' for name, count in layers.items())}. Headers and notes of the shards are "
        "left out; the basis of low-rank rows is counted.",
        "",
        "| rows | " + " | ".join(f"{name}: a passage | {name}: a billion tokens" for name in MODELS) + " |",
        "| --- " * (1 + 2 * len(MODELS)) + "|",
    ]
    for dtype, rank in dict.fromkeys((row["dtype"], row["rank"]) for row in rows):
        cells = []
        for row in rows:
            if (row["dtype"], row["rank"]) == (dtype, rank):
                cells += [f"{row['per_passage'] / 1e3:,.0f} kB", f"{(row['rows'] + row['basis']) / 1e12:.2f} TB"]
        lines.append(f"| {format_name(dtype, rank)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def hours_text(result: Result) -> str:
    """Hours and GPUs, and what the disk has to take, as a sentence and a Markdown table."""
    planned = plan_rows(result)
    if not planned:
        return "Not computed: the benchmark was not of llama-3.1-8b.\n"
    small, speed = planned[0], result.get("product_operations_per_second")
    rate = TOKENS / small["gpu_hours"] / 3600
    used = rate * result["model"]["operations_per_token"]
    share = f", {used / speed:.0%} of a large matrix product's {speed / 1e12:.0f}" if speed else ""
    disk = {(row["model"], row["dtype"]): row["rows"] for row in _disk_of(result) if row["rank"] is None}
    lines = [
        f"Measured on one {result['device']} ({result['date']}): {small['model']} caches {rate:,.0f} tokens/s, which "
        f"is {used / 1e12:.0f} TFLOP/s{share}. The row of {planned[-1]['model']} is an estimate: it assumes that the "
        "GPUs which share its weights reach the same TFLOP/s each, and that what they send one another costs nothing. "
        "Hours divide by the number of GPUs, as every one caches passages of its own.",
        "",
        "| model | GPU hours | GPUs of 80 GB for the weights | MB/s to the disk for each GPU, bfloat16 rows "
        "| the same, int8 or fp8 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in planned:
        seconds = 3600 * row["gpu_hours"]
        rates = " | ".join(f"{disk[row['model'], dtype] / seconds / 1e6:,.0f}" for dtype in ("bfloat16", "int8"))
        hours = f"{row['gpu_hours']:,.0f}{' (estimate)' if row['estimated'] else ''}"
        lines.append(f"| {row['model']} | {hours} | {row['gpus_for_weights']} | {rates} |")
    return "\n".join(lines) + "\n"


def write_plan_parts(measured: Path, target: Path) -> list[Path]:
    """Writes the page's generated Markdown; disk space needs no measurement, what needs one and lacks it says so.

    Args:
        measured: Folder with the JSON files.
        target: ``book/_generated``.

    Returns:
        The files written.
    """
    target.mkdir(parents=True, exist_ok=True)
    rates = throughput.load(measured) if (measured / throughput.RESULT).is_file() else None
    parts = {
        "formats": formats_text(load(measured)) if (measured / RESULT).is_file() else _STUB,
        "disk": disk_text(*_shape_of(rates)),
        "hours": throughput.STUB if rates is None else hours_text(rates),
    }
    written = []
    for name, text in parts.items():
        path = target / f"plan_{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _disk_of(result: Result) -> list[dict[str, Any]]:
    return disk_rows(*_shape_of(result))


def _shape_of(result: Result | None) -> tuple[int, int]:
    """Tokens in a passage and features of a layer: those of the benchmark, or of its defaults."""
    from grass_lib.bench.throughput_run import BLOCK, FACTGRASS
    from grass_lib.specs import CompressionSpec

    sizes = [CompressionSpec.parse(text).k for text in (result["spec"] if result else FACTGRASS, FACTGRASS)]
    return (result["block"] if result else BLOCK), next(size for size in sizes if size is not None)
