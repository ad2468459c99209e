"""The page "How fast is caching a large model?": figure, tables and sentences drawn from the benchmark's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.report.figure_files import FORMATS, figure_markdown, save_figure
from grass_lib.report.fp8_scores import fp8_text
from grass_lib.report.plan import plan_table
from grass_lib.report.results import goal_table, read_result
from grass_lib.report.style import NEUTRAL, figure_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "throughput.json"
FIGURE = "throughput_rows"
STUB = "Not measured yet: `grass bench throughput --fp8 --json book/measured/throughput.json` writes it, on a GPU.\n"
NAMES = {
    "plain": "transformers' model, forward and backward to activations",
    "reference": "a step like the reference's, nothing written",
    "bare": "ours without capture",
    "caching": "ours, caching to disk",
}
_COLOURS = {"plain": NEUTRAL, "reference": "#D55E00", "bare": "#56B4E9", "caching": "#0072B2", "fp8": "#009E73"}

Result = Mapping[str, Any]


def load(folder: Path) -> dict[str, Any]:
    """Reads the benchmark.

    Args:
        folder: Usually ``book/measured``.

    Raises:
        RecordError: It is missing or has no rows.
    """
    return read_result(folder / RESULT, "rows", "grass bench throughput --json PATH")


def measured_rows(result: Result) -> list[Mapping[str, Any]]:
    """Rows that have a speed, in the order of the table: plain, reference, bare, caching; then by batch and layers."""
    order = list(NAMES)
    rows = [row for row in result["rows"] if row["tokens_per_second"]]
    return sorted(
        rows,
        key=lambda row: (
            order.index(row["step"]),
            row["spec"],
            row["layers"],
            row["hessian"],
            bool(row.get("fp8")),
            row["batch"],
        ),
    )


def row_name(row: Mapping[str, Any]) -> str:
    """A row in words, without its batch."""
    parts = [NAMES[row["step"]]]
    if row["spec"]:
        parts.append(f"{row['spec'].removesuffix('->identity')}, {row['layers']} layers")
    if row["hessian"] == "eFIM":
        parts.append("curvature on the GPU")
    if row.get("fp8"):
        parts.append("FP8 products")
    if row["note"] and row["tokens_per_second"]:
        parts.append(row["note"])
    return "; ".join(parts)


def speed_figure(result: Result) -> Figure:
    """Tokens a second of every row, with the peak of the memory beside the bar."""
    import matplotlib.pyplot as plt

    rows = measured_rows(result)
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 0.42 * len(rows) + 1.1), layout="constrained")
        speeds = [row["tokens_per_second"] for row in rows]
        axes.barh(
            range(len(rows)),
            speeds,
            color=[_COLOURS["fp8" if row.get("fp8") else row["step"]] for row in rows],
            height=0.7,
            linewidth=0,
        )
        floor = _floor(result)
        # Labels stand in one column right of the axes, where neither the line nor the grid crosses them.
        edge = 1.02 * max([*speeds, floor or 0.0])
        for place, row in enumerate(rows):
            memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
            axes.text(1.01 * edge, place, f"{speeds[place]:,.0f}{memory}", va="center", fontsize=8, color=NEUTRAL)
        if floor:
            axes.axvline(floor, color=NEUTRAL, linewidth=1.2, linestyle=":", label="arithmetic alone, bfloat16")
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=8)
        names = [f"{_short(row)}, batch {row['batch']}" for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, edge)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens/s")
    return figure


def _short(row: Mapping[str, Any]) -> str:
    """A row for the axis of the figure."""
    words = {"plain": "transformers", "reference": "like the reference", "bare": "ours, no capture", "caching": "ours"}
    name = words[row["step"]]
    if row["step"] == "caching":
        kind = "LoGra" if row["spec"].startswith("normal") else "FactGraSS" if "sjlt" in row["spec"] else row["spec"]
        name = f"ours, {kind}, {row['layers']} layers{', eFIM' if row['hessian'] == 'eFIM' else ''}"
    if row.get("fp8"):
        name += ", FP8"
    return name


def _floor(result: Result) -> float | None:
    """Tokens a second that the products alone would allow."""
    speed = result.get("product_operations_per_second")
    return speed / result["model"]["operations_per_token"] if speed else None


def speed_table(result: Result) -> str:
    """All rows as a Markdown table, with the ratio to the fastest plain row."""
    rows = measured_rows(result)
    plain = max((row["tokens_per_second"] for row in rows if row["step"] == "plain"), default=None)
    lines = [
        "| step | batch | tokens/s | times the plain model's best | peak memory | first step, with compilation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio = "" if plain is None else f"{row['tokens_per_second'] / plain:.2f}"
        memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"
        first = "" if row["first_batch_seconds"] is None else f"{row['first_batch_seconds']:.1f} s"
        lines.append(
            f"| {row_name(row)} | {row['batch']} | {row['tokens_per_second']:,.0f} | {ratio} | {memory} | {first} |"
        )
    lines += [
        f"| {row_name(row)} | {row['batch']} | {row['note']} | | | |"
        for row in result["rows"]
        if row["note"] and not row["tokens_per_second"]
    ]
    return "\n".join(lines) + "\n"


def split_table(result: Result) -> str:
    """Milliseconds of a caching step by part: forward and backward pass, compression, transfer, writing, curvature.

    The pass is the step without capture of the same batch, compression what the capture adds to it; transfer and
    curvature are by the device's clock, writing is what was waited for the disk.
    """
    bare = {row["batch"]: row["seconds"]["step"] for row in result["rows"] if row["step"] == "bare" and row["seconds"]}
    lines = [
        "| caching, ms | batch | whole step | forward, backward | compression | transfer | disk wait | curvature |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in measured_rows(result):
        if row["step"] != "caching" or row["batch"] not in bare or row.get("fp8"):
            continue
        given = row["seconds"]
        parts = [given["step"], bare[row["batch"]], max(0.0, given["capture"] - bare[row["batch"]])]
        parts += [given["transfer"], given["write"], given["curvature"]]
        cells = " | ".join(f"{1000 * part:.1f}" for part in parts)
        lines.append(f"| {_short(row).removeprefix('ours, ')} | {row['batch']} | {cells} |")
    return "\n".join(lines) + "\n"


def device_sentence(result: Result) -> str:
    """Where and how it was measured, and what the written rows were checked against."""
    model, versions = result["model"], ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    weights = "random weights" if model["weights"] == "random" else "its own weights"
    text = (
        f"Measured on one {result['device']} in one run of `{_command(result)}` ({result['date']}; {versions}): "
        f"{model['name']} ({model['parameters'] / 1e9:.2f} billion weights, {weights}, {model['dtype']}), blocks of "
        f"{result['block']:,} random tokens, {result['samples']} of them cached for each caching row."
    )
    floor = _floor(result)
    if floor:
        speed = result["product_operations_per_second"] / 1e12
        text += (
            f" A token needs at least {model['operations_per_token'] / 1e9:.1f} GFLOP; at the {speed:.0f} TFLOP/s of a "
            f"large matrix product, measured in the same run, that would be {floor:,.0f} tokens/s."
        )
    check, problems = result["check"], [p for row in result["rows"] for p in row["stored"].get("problems", [])]
    if check.get("worst_cosine") is not None:
        text += (
            f" {check['rows']} of the gradients that were written were compared with an eager capture of the same "
            f"model in float32: the worst cosine of any sample and layer is {check['worst_cosine']:.4f} "
            f"({check['worst_layer']}), the median {check['median_cosine']:.4f}."
        )
    eager = check.get("eager")
    if eager:
        text += (
            f" An eager capture in {model['dtype']}, of each sequence alone, has {eager['worst_cosine']:.4f} "
            f"({eager['worst_layer']}) and {eager['median_cosine']:.4f}."
        )
    state = f"Damaged shards: {'; '.join(problems)}" if problems else "Every shard was read back and has its checksum."
    return f"{text} {state}\n"


def _command(result: Result) -> str:
    return result["command"] + (" --fp8" if any(row.get("fp8") for row in result["rows"]) else "")


def write_figures(measured: Path, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draws the page's figure; none where there is no benchmark.

    Args:
        measured: Folder with the JSON file.
        folder: Where to write.
        formats: Suffixes to write.

    Returns:
        The files written.
    """
    import matplotlib.pyplot as plt

    if not (measured / RESULT).is_file():
        return []
    figure = speed_figure(load(measured))
    written = save_figure(figure, FIGURE, folder, formats)
    plt.close(figure)
    return written


def write_throughput_parts(measured: Path, target: Path) -> list[Path]:
    """Writes the page's figure and generated Markdown.

    Args:
        measured: Folder with the JSON file; where it is missing, the parts say how to make it.
        target: ``book/_generated``; the figure goes into ``figures/`` below it, the rest into ``throughput_*.md``.

    Returns:
        The files written.
    """
    target.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    parts: dict[str, str] = dict.fromkeys(("device", "goals", "table", "split", "figure", "plan"), STUB)
    result = load(measured) if (measured / RESULT).is_file() else None
    if result is not None:
        parts = {
            "device": device_sentence(result),
            "goals": goal_table(result["goals"]),
            "table": speed_table(result),
            "split": split_table(result),
            "plan": plan_table(result),
        }
        written += write_figures(measured, target / "figures", ("svg",))
        caption = (speed_figure.__doc__ or "").splitlines()[0]
        parts["figure"] = figure_markdown(f"{FIGURE}.svg", caption)
    parts["fp8"] = fp8_text(result, measured)
    for name, text in parts.items():
        path = target / f"throughput_{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
