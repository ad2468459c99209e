"""The goals of one caching step, set for one H100, against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grass_lib.bench.results import judged

SPEED, MEMORY = 0.95, 1.05
"""Beside the passes alone: at least so much of the speed, at most so much of the memory."""


def judged_spec(result: Mapping[str, Any]) -> str:
    """The compression that goals are about: the first that was measured."""
    return next((row["spec"] for row in result["rows"] if row["step"] == "caching"), "")


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compares the first compression with the passes alone, on a GPU; memory and speed beside training too.

    Args:
        result: Of `run`.

    Returns:
        ``{"goal", "measured", "limit", "unit", "at_most", "met"}``.
    """
    found: list[dict[str, Any]] = []
    if result["device_type"] != "cuda":
        return found
    first = judged_spec(result)
    for name in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = {(row["step"], row["spec"]): row for row in result["rows"] if row["dtype"] == name}
        ours, alone, training = (rows.get(key) for key in (("caching", first), ("activations", ""), ("training", "")))
        if ours is None or alone is None:
            continue
        memory = ours["peak_bytes"] / alone["peak_bytes"]
        found.append(judged(f"{name}: speed, as a share of the passes alone", ours["speed_share"], SPEED, "", False))
        found.append(judged(f"{name}: memory, as a share of the passes alone", memory, MEMORY, "", True))
        if training is not None:
            speed = ours["tokens_per_second"] / training["tokens_per_second"]
            memory = ours["peak_bytes"] / training["peak_bytes"]
            found.append(judged(f"{name}: speed, times that of training", speed, 1.0, "", False))
            found.append(judged(f"{name}: memory, as a share of training's", memory, 1.0, "", True))
    return found
