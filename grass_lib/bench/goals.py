"""The goals of the projection kernels, set for one H100, against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grass_lib.bench.results import judged

_ABSOLUTE = (((64, 4_800_000, 4096), 0.75), ((512, 109_386, 4096), 0.18), ((64, 13_300_000, 2048), 2.0))
_FAST_SHAPES = ((64, 4_800_000, 4096), (512, 109_386, 4096), (64, 13_300_000, 2048))


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compares a result of `projections.run` with the goals.

    Args:
        result: With ``lines`` and ``grass_sweep``.

    Returns:
        One row a goal that could be measured: ``{"goal", "measured", "limit", "unit", "at_most", "met"}``.
    """
    rows = []
    for shape, limit in _ABSOLUTE:
        ms = _ms(result, "sjlt", "kernel", shape)
        if ms is not None:
            rows.append(judged(f"SJLT, {_text(shape)}", ms, limit, "ms", True))
    for shape in _FAST_SHAPES:
        package = _ms(result, "rademacher", "fast_jl", shape)
        for family, least, label in (("fjlt", 10.0, "fast JL transform"), ("rademacher", 1.0, "dense Rademacher")):
            ms = _ms(result, family, "kernel", shape)
            if ms and package:
                rows.append(
                    judged(
                        f"{label}, {_text(shape)}, times as fast as the dense projection of fast_jl",
                        package / ms,
                        least,
                        "x",
                        False,
                    )
                )
    sweep = {line["p"]: line["build_and_project_ms"] for line in result.get("grass_sweep", [])}
    if 1_000_000 in sweep and 100_000_000 in sweep:
        growth = sweep[100_000_000] / sweep[1_000_000]
        rows.append(judged("GraSS with 32,768 kept, time at p = 100M over p = 1M", growth, 1.3, "x", True))
    return rows


def _ms(result: Mapping[str, Any], family: str, backend: str, shape: tuple[int, int, int]) -> float | None:
    batch, p, k = shape
    for line in result["lines"]:
        case = line["case"]
        here = (case["part"], case["spec"], case["backend"], case["batch"], case["p"])
        if here == ("shapes", f"{family}-{k}", backend, batch, p):
            return line["ms"]
    return None


def _text(shape: tuple[int, int, int]) -> str:
    batch, p, k = shape
    return f"({batch}, {p:,}) to {k:,}"
