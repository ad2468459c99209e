"""The page "How fast is sparse projection?": figures, tables and sentences drawn from the benchmark's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.bench.goals import goals
from grass_lib.report.figure_files import FORMATS, figure_markdown, save_figure
from grass_lib.report.results import goal_table, read_result
from grass_lib.report.style import METHODS, NEUTRAL, figure_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULT, QUALITY = "projections.json", "blocksjlt_quality.json"
_STUB = "Not measured yet: `grass bench projections --json book/measured/projections.json` writes it.\n"
_PACKAGE_STYLE = {"sjlt": ("#D55E00", "s"), "fast_jl": ("#CC79A7", "X")}
_BLOCK = ("#7B68EE", "h")
_LABELS = {"sjlt": "SJLT", "blocksjlt": "block SJLT", "fjlt": "fast JL", "rademacher": "dense Rademacher"}

Line = Mapping[str, Any]


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Reads the benchmark and, where it is there, the quality of blocksjlt.

    Args:
        folder: Usually ``book/measured``.

    Raises:
        RecordError: The benchmark is missing or has no lines.
    """
    result, quality = read_result(folder / RESULT, "lines", "grass bench projections --json PATH"), folder / QUALITY
    result["goals"] = goals(result)  # judged then too; the words are today's
    if not quality.is_file():
        return result, None
    return result, read_result(quality, "lines", "python benchmarks/blocksjlt_quality.py")


def _look(family: str, backend: str) -> tuple[str, str, str]:
    """Label, colour and marker of one line of a figure."""
    if backend in _PACKAGE_STYLE:
        return f"package {backend}", *_PACKAGE_STYLE[backend]
    colour, marker = _BLOCK if family == "blocksjlt" else (METHODS[family].colour, METHODS[family].marker)
    return _LABELS.get(family, family), colour, marker


def _family(line: Line) -> str:
    return str(line["case"]["spec"]).split("-")[0]


def _curves(lines: Iterable[Line], axis: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines:
        if line["ms"] is not None:
            key = (_family(line), line["case"]["backend"])
            curves.setdefault(key, []).append((line["case"][axis], line["ms"]))
    return {key: sorted(points) for key, points in curves.items()}


def _draw(axes: Axes, result: Mapping[str, Any], part: str, axis: str) -> None:
    lines = [line for line in result["lines"] if line["case"]["part"] == part]
    for (family, backend), points in _curves(lines, axis).items():
        label, colour, marker = _look(family, backend)
        dashes = (0, (4, 2)) if backend in _PACKAGE_STYLE else "solid"
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, linestyle=dashes, markersize=5)
    case = lines[0]["case"]
    floor = 1e3 * 4 * case["batch"] * case["p"] / result["read_bytes_per_second"]
    axes.axhline(floor, color=NEUTRAL, linewidth=1.2, linestyle=":", label="reading the input once")
    axes.set_yscale("log")
    axes.set_ylabel("time, ms")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)


def time_against_k(result: Mapping[str, Any]) -> Figure:
    """Time of four operators and two packages against k."""
    import matplotlib.pyplot as plt

    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 4.0), layout="constrained")
        _draw(axes, result, "k", "k")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("k, outputs")
        case = next(line["case"] for line in result["lines"] if line["case"]["part"] == "k")
        axes.set_title(f"{case['batch']} vectors of {case['p']:,}, fp32")
    return figure


def time_against_density(result: Mapping[str, Any]) -> Figure:
    """Time of the SJLT against the share of the input that is not zero."""
    import matplotlib.pyplot as plt

    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
        _draw(axes, result, "density", "density")
        axes.set_xscale("log")
        axes.set_xlabel("share of the input that is not zero")
        case = next(line["case"] for line in result["lines"] if line["case"]["part"] == "density")
        axes.set_title(f"{case['batch']} vectors of {case['p']:,} to k = {case['k']:,}, fp32")
    return figure


def roofline(result: Mapping[str, Any]) -> Figure:
    """Share of the measured read speed that each backend reaches, by shape."""
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(_shape(line) for line in _main(result, ("sjlt", "fjlt"))))
    keys = [("sjlt", "kernel"), ("fjlt", "kernel"), ("sjlt", "torch"), ("sjlt", "sjlt"), ("rademacher", "fast_jl")]
    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 0.75 * len(shapes) + 1.4), layout="constrained")
        height = 0.8 / len(keys)
        for i, (family, backend) in enumerate(keys):
            found = {_shape(line): line for line in _main(result, (family,)) if line["case"]["backend"] == backend}
            label, colour, _ = _look(family, backend)
            label = f"{label}, plain PyTorch" if backend == "torch" else label
            share = [100 * (found[s]["roofline_fraction"] or 0) if s in found and found[s]["ms"] else 0 for s in shapes]
            places = [row + (i - len(keys) / 2 + 0.5) * height for row in range(len(shapes))]
            colour = "#56B4E9" if backend == "torch" else colour
            bars = axes.barh(places, share, height=height, color=colour, label=label, linewidth=0)
            axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2, color=NEUTRAL)
        axes.set_yticks(range(len(shapes)), [f"{b} × {p:,} → {k:,}" for b, p, k in shapes])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"percent of the measured read speed, {result['read_bytes_per_second'] / 1e12:.2f} TB/s")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


def quality_against_speed(result: Mapping[str, Any]) -> Figure:
    """Error of an inner product of unit vectors, as theory has it, against time: where a user chooses."""
    import matplotlib.pyplot as plt

    with figure_style():
        figure, axes = plt.subplots(figsize=(7.6, 4.0), layout="constrained")
        lines = [line for line in result["lines"] if line["case"]["part"] == "k"]
        for (family, backend), points in _curves(lines, "k").items():
            label, colour, marker = _look(family, backend)
            dashes = (0, (4, 2)) if backend in _PACKAGE_STYLE else "solid"
            times, deviations = [ms for _, ms in points], [k**-0.5 for k, _ in points]
            axes.plot(times, deviations, label=label, color=colour, marker=marker, linestyle=dashes, markersize=5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("time, ms")
        axes.set_ylabel("error of an inner product\n(theory, 1/√k)")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    return figure


FIGURES = {
    "kernels_time_k": time_against_k,
    "kernels_time_density": time_against_density,
    "kernels_roofline": roofline,
    "kernels_quality_speed": quality_against_speed,
}


def _main(result: Mapping[str, Any], families: Sequence[str]) -> list[Line]:
    return [line for line in result["lines"] if line["case"]["part"] == "shapes" and _family(line) in families]


def _shape(line: Line) -> tuple[int, int, int]:
    return line["case"]["batch"], line["case"]["p"], line["case"]["k"]


def grass_sentence(result: Mapping[str, Any]) -> str:
    """What building and projecting take apart, by p, as Markdown."""
    sweep = result.get("grass_sweep", [])
    if not sweep:
        return ""
    parts = [f"{1000 * line['project_ms']:.1f} µs at p = {line['p']:,}" for line in sweep]
    whole = [f"{line['build_and_project_ms']:.2f} ms at p = {line['p']:,}" for line in sweep]
    return (
        f"GraSS takes {', '.join(whole)} with its indices drawn and its table built, as the goal has it; that is "
        f"nearly all of the time and hardly depends on p. Once built, projecting {sweep[0]['batch']} vectors takes "
        f"{', '.join(parts)}: the kept coordinates lie farther apart in memory.\n"
    )


def time_table(result: Mapping[str, Any]) -> str:
    """All operators on the main shapes, as a Markdown table."""
    rows = ["| input | operator | backend | ms | % of read speed | error |", "| --- | --- | --- | --- | --- | --- |"]
    for line in (line for line in result["lines"] if line["case"]["part"] == "shapes"):
        case = line["case"]
        start = f"| {case['batch']} × {case['p']:,} | `{case['spec']}` | {case['backend']} |"
        if line["ms"] is None:
            rows.append(f"{start} {line['note']} | | |")
            continue
        share = "" if line["roofline_fraction"] is None else f"{100 * line['roofline_fraction']:.0f}"
        error = "own matrix" if line["relative_error"] is None else f"{line['relative_error']:.0e}"
        rows.append(f"{start} {line['ms']:.3f} | {share} | {error} |")
    return "\n".join(rows) + "\n"


def quality_table(quality: Mapping[str, Any] | None) -> str:
    """Variances of sjlt and blocksjlt over the SJLT's exact variance, as a Markdown table."""
    if quality is None:
        return "Not measured yet: `python benchmarks/blocksjlt_quality.py` writes it.\n"
    rows = [
        "| vectors | operator | variance of inner products | variance of squared norms |",
        "| --- | --- | --- | --- |",
    ]
    for line in quality["lines"]:
        rows.append(
            f"| {line['vectors']} | `{line['family']}-{line['k']}` | {line['inner_to_theory']:.3f} ± "
            f"{line['inner_error']:.3f} | {line['norm_to_theory']:.3f} ± {line['norm_error']:.3f} |"
        )
    return "\n".join(rows) + "\n"


def device_sentence(result: Mapping[str, Any]) -> str:
    """Where and how it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"Measured on one {result['device']} in one run of `{result['command']}` ({result['date']}; {versions}). The "
        "goals were set for an H100; this device reads its memory at "
        f"{result['read_bytes_per_second'] / 1e12:.2f} TB/s, measured in the same run.\n"
    )


def write_figures(measured: Path, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draws all figures of the page; none where there is no benchmark.

    Args:
        measured: Folder with the JSON files.
        folder: Where to write.
        formats: Suffixes to write.

    Returns:
        The files written.
    """
    import matplotlib.pyplot as plt

    if not (measured / RESULT).is_file():
        return []
    result, _ = load(measured)
    written = []
    for stem, draw in FIGURES.items():
        figure = draw(result)
        written += save_figure(figure, stem, folder, formats)
        plt.close(figure)
    return written


def write_page_parts(measured: Path, target: Path) -> list[Path]:
    """Writes the page's figures and generated Markdown.

    Args:
        measured: Folder with the JSON files; where they are missing, the parts say how to make them.
        target: ``book/_generated``; figures go into ``figures/`` below it, tables into ``kernels_*.md``.

    Returns:
        The files written.
    """
    target.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    parts = dict.fromkeys(("device", "goals", "grass", "times", "quality", *FIGURES), _STUB)
    if (measured / RESULT).is_file():
        result, quality = load(measured)
        parts |= {
            "device": device_sentence(result),
            "goals": goal_table(result["goals"]),
            "grass": grass_sentence(result),
            "times": time_table(result),
            "quality": quality_table(quality),
        }
        written += write_figures(measured, target / "figures", ("svg",))
        for stem, draw in FIGURES.items():
            caption = (draw.__doc__ or "").splitlines()[0]
            parts[stem] = figure_markdown(f"{stem}.svg", caption)
    for name, text in parts.items():
        path = target / f"kernels_{name.removeprefix('kernels_')}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
