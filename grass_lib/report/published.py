"""The figures that the paper's authors published, as data: ``published.json`` beside this module."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def _document() -> dict[str, Any]:
    return json.loads(files("grass_lib.report").joinpath("published.json").read_text(encoding="utf-8"))


def published_rows(experiment: str | None = None) -> list[dict[str, Any]]:
    """Published LDS and projection seconds.

    Args:
        experiment: one pair, or None for all.

    Returns:
        One dictionary per published row, with ``experiment``, ``attributor``, ``sparsification``, ``projection``, ``k``
        (for factored rows that of one layer), ``lds``, ``projection_seconds`` (s) and ``damping``.
    """
    rows = [{**row, "k": row.get("k", row.get("k_per_layer"))} for row in _document()["rows"]]
    return [row for row in rows if experiment in (None, row["experiment"])]


def published_source() -> str:
    """One sentence that says where the published figures come from."""
    return _document()["source"]


def published_claims() -> list[dict[str, Any]]:
    """Published statements that are not rows of a table, such as the throughput claim."""
    return list(_document()["claims"])
