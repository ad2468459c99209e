"""What a billion tokens would take: disk, hours and GPUs, from the rates of one measured run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOKENS = 1_000_000_000
_GPU_BYTES = 80e9


def linear_layers(model: str) -> int:
    """Linear layers of a Llama: seven in each decoder layer, and the output layer.

    Args:
        model: A name of ``grass_lib.experiments.models.llama.SHAPES``.
    """
    from grass_lib.experiments.models.llama import SHAPES

    return 7 * SHAPES[model].layers + 1


def plan_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Disk, hours and GPUs for a billion tokens.

    The 8B row has the measured rate of the fastest caching row with the output layer. The 70B row has that rate times
    the ratio of the operations that a token needs; it is an estimate: the same operations a second on each of the GPUs
    that share the model.

    Args:
        result: Of the throughput benchmark, for a model called ``llama-3.1-8b``.

    Returns:
        ``{model, layers, bytes, gpu_hours, gpus_for_weights, estimated}``; nothing where that was not measured.
    """
    from grass_lib.bench.throughput_steps import operations
    from grass_lib.experiments.models.llama import SHAPES

    rows = [row for row in result["rows"] if row["step"] == "caching" and row["tokens_per_second"]]
    rows = [row for row in rows if row["spec"] == result["spec"] and row["hessian"] != "eFIM" and not row.get("fp8")]
    if result["model"]["name"] != "llama-3.1-8b" or not rows:
        return []
    most = max(row["layers"] for row in rows)
    best = max((row for row in rows if row["layers"] == most), key=lambda row: row["tokens_per_second"])
    passages, per_layer = TOKENS // result["block"], best["stored"]["k"] / best["layers"]
    found = []
    for name, layers in (("llama-3.1-8b", best["layers"]), ("llama-3.1-70b", linear_layers("llama-3.1-70b"))):
        sizes, same = SHAPES[name], name == "llama-3.1-8b"
        needed = operations(sizes.linear_weights, sizes.layers, sizes.width, result["block"])
        rate = best["tokens_per_second"] * (1.0 if same else result["model"]["operations_per_token"] / needed)
        weights = 2 * (sizes.linear_weights + sizes.vocabulary * sizes.width)
        found.append(
            {
                "model": name,
                "layers": layers,
                "bytes": passages * layers * per_layer * 2,
                "gpu_hours": TOKENS / rate / 3600,
                "gpus_for_weights": int(-(-weights // _GPU_BYTES)),
                "estimated": not same,
            }
        )
    return found


def plan_table(result: Mapping[str, Any]) -> str:
    """`plan_rows` as a Markdown table; a sentence where they cannot be computed."""
    rows = plan_rows(result)
    if not rows:
        return "Not computed: the benchmark was not of llama-3.1-8b.\n"
    lines = [
        "| model | layers | disk, bfloat16 rows | GPU hours, GPUs of this kind | GPUs of 80 GB for the weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        hours = f"{row['gpu_hours']:,.0f}{' (estimate)' if row['estimated'] else ''}"
        lines.append(
            f"| {row['model']} | {row['layers']} | {row['bytes'] / 1e12:.2f} TB | {hours} | {row['gpus_for_weights']} |"
        )
    return "\n".join(lines) + "\n"
