"""What 8 and 64 GPUs would do, from the rates of one measured run on two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

TOKENS = 1_000_000_000
NETWORK = 50e9
"""Bytes a second of one GPU's link between hosts, assumed: 400 Gbit/s."""
HOST = 8
"""GPUs that share a host's fast links."""
COUNTS = (2, 8, 64)


def plan_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rates and seconds for some numbers of GPUs.

    Caching sends nothing between ranks: the measured rate of a rank of two, times their number. Adding the sums of
    squares passes a rank's whole sums through its link once, whatever the number of ranks: within a host at the
    measured rate, between hosts at `NETWORK` where that is slower. Decompositions are the slowest rank's layers, one
    after another.

    Args:
        result: Of ``grass bench scaling``, with the parts caching and curvature.

    Returns:
        ``{gpus, tokens_per_second, hours, disk_bytes_per_second, sum_bytes, reduce_seconds, eigen_seconds}``; nothing
        where one of the rates was not measured.
    """
    caching, curvature = result["parts"].get("caching", {}), result["parts"].get("curvature", {})
    sums = curvature.get("sums_2", [])
    if "speedup" not in caching or not sums or not all(each.get("eigen_seconds") for each in sums):
        return []
    rate = caching["tokens_per_second_2"] / 2
    row_bytes = caching["store"]["bytes"] / result["main"]["rows"]
    slowest = max(each["reduce_seconds"] for each in sums)
    first, each_eigen = sums[0], max(each["eigen_seconds"] for each in sums)
    link = first["bytes"] / slowest
    found = []
    for count in COUNTS:
        tokens = rate * count
        found.append(
            {
                "gpus": count,
                "tokens_per_second": tokens,
                "hours": TOKENS / tokens / 3600,
                "disk_bytes_per_second": tokens / result["main"]["block"] * row_bytes,
                "sum_bytes": first["bytes"],
                "reduce_seconds": first["bytes"] / (link if count <= HOST else min(link, NETWORK)),
                "eigen_seconds": math.ceil(first["layers"] / count) * each_eigen,
            }
        )
    return found


def plan_table(result: Mapping[str, Any]) -> str:
    """`plan_rows` as a Markdown table with what it assumes; a sentence where it cannot be computed."""
    rows = plan_rows(result)
    if not rows:
        return "Not computed: the run has no rates of caching and curvature on two ranks.\n"
    lines = [
        "| GPUs | tokens/s | hours for a billion tokens | to the disk | bytes of sums of each rank | adding them | "
        "decompositions of the slowest rank |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['gpus']} | {row['tokens_per_second']:,.0f} | {row['hours']:.2f} | "
            f"{row['disk_bytes_per_second'] / 1e9:.3g} GB/s | {row['sum_bytes'] / 1e9:.3g} GB | "
            f"{row['reduce_seconds']:.2g} s | {row['eigen_seconds']:,.1f} s |"
        )
    return (
        "\n".join(lines)
        + f"\n\nThe first row is measured but for the decompositions; the others assume: caching sends nothing between "
        "ranks, and there are many more shards than ranks; the disk keeps up with the column beside it; each rank's "
        f"sums go through its link once, at the measured rate within a host of {HOST} GPUs and at "
        f"{NETWORK / 1e9:.0f} GB/s between hosts where that is slower; layers are spread evenly, and each takes as "
        "long as the one that was timed.\n"
    )
