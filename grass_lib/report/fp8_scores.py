"""What FP8 products do to scores, for the page on throughput: on a GPU at full size, and on pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.report.results import read_result

RESULT = "fp8_scores.json"
_NO_ROWS = (
    "Not measured yet on a GPU: `grass bench throughput --fp8 --json book/measured/throughput.json` adds these rows.\n"
)
_NO_SCORES = f"Not measured yet on pretrained weights: `python benchmarks/fp8_scores.py book/measured/{RESULT}` does.\n"


def fp8_text(bench: Mapping[str, Any] | None, measured: Path) -> str:
    """Both measurements as Markdown, or how to make what is missing.

    Args:
        bench: Result of `grass bench throughput`; None where there is none.
        measured: Usually ``book/measured``.

    Raises:
        RecordError: The file of scores is damaged.
    """
    return f"{_bench_text(bench)}\n{_scores_text(measured / RESULT)}"


def _bench_text(bench: Mapping[str, Any] | None) -> str:
    rows = [row for row in (bench or {}).get("rows", []) if row.get("fp8")]
    if bench is None or not rows:
        return _NO_ROWS
    found, sentences = bench.get("fp8") or {}, []
    for row in rows:
        if row["tokens_per_second"] is None:
            sentences.append(f"At batch {row['batch']} caching with FP8 products was not measured: {row['note']}.")
            continue
        same = [
            other["tokens_per_second"]
            for other in bench["rows"]
            if not other.get("fp8")
            and other["tokens_per_second"]
            and all(other[key] == row[key] for key in ("step", "spec", "layers", "hessian", "batch"))
        ]
        times = row["tokens_per_second"] / max(same) if same else None
        ratio = "" if times is None else f", {times:.2f} times the row without"
        ratio += "; why it is slower has not been measured" if times is not None and times < 0.995 else ""
        special = f" ({row['note']})" if row["note"] else ""
        sentences.append(
            f"At batch {row['batch']} caching with FP8 products{special} runs {row['tokens_per_second']:,.0f} "
            f"tokens/s{ratio}."
        )
    if found.get("worst_cosine") is not None:
        sentences.append(
            f"Compared with the eager capture in float32, the worst cosine of {found['rows']} of its rows over all "
            f"layers is {found['worst_cosine']:.4f} ({found['worst_layer']}), the median "
            f"{found['median_cosine']:.4f}{_beside(bench)}."
        )
    if found.get("mean_spearman") is not None:
        sentences.append(
            f"Inner products of each of {found['scored_rows']} rows with the others rank them with a Spearman "
            f"correlation of {found['mean_spearman']:.4f} with and without FP8 products (mean over rows; the lowest is "
            f"{found['worst_spearman']:.4f}). Of random weights and tokens scores mean nothing and lie close together."
        )
    return " ".join(sentences) + "\n"


def _beside(bench: Mapping[str, Any]) -> str:
    check = bench.get("check") or {}
    if check.get("worst_cosine") is None:
        return ""
    return f" (without FP8 products {check['worst_cosine']:.4f} and {check['median_cosine']:.4f})"


def load_scores(path: Path) -> dict[str, Any]:
    """Reads what `benchmarks/fp8_scores.py` wrote.

    Args:
        path: The JSON file.

    Raises:
        RecordError: It is not readable or has no variants.
    """
    return read_result(path, "variants", "python benchmarks/fp8_scores.py PATH")


def _scores_text(path: Path) -> str:
    if not path.is_file():
        return _NO_SCORES
    found = load_scores(path)
    text = (
        f"On {found['model']}, whose weights are pretrained, {found['passages']} passages of up to {found['tokens']} "
        f"tokens and {found['prompts']} prompts were scored with gradients of {found['layers']} linear layers: the "
        f"output layer and those of the last {found['last_blocks']} of {found['blocks']} blocks ({found['spec']}). "
        f"They were computed in each of these ways and compared with float32 ({found['date']}, on a CPU, which makes "
        "the roundings of FP8 without its speed). Products in FP8 are those of all blocks.\n\n"
    )
    lines = [
        "| computed in | curvature | mean Spearman | lowest prompt | top 10 shared | mean cosine | worst layer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in found["variants"]:
        for hessian, scores in variant["scores"].items():
            lines.append(
                f"| {variant['name']} | {hessian} | {scores['mean_spearman']:.4f} | {scores['worst_spearman']:.4f} | "
                f"{scores['top_shared']:.0%} | {variant['mean_cosine']:.4f} | {variant['worst_mean_cosine']:.4f} |"
            )
    worst = " and ".join(dict.fromkeys(variant["worst_layer"] for variant in found["variants"]))
    lines.append(
        "\nSpearman's correlation is over the passages, per prompt; cosines are of a passage's compressed gradient, by "
        f"layer: the mean over all, and the mean of the worst layer ({worst})."
    )
    return text + "\n".join(lines) + "\n"
