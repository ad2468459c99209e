"""Results of benchmarks, as JSON files that pages are drawn from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grass_lib.errors import RecordError


def read_result(path: Path, holds: str, command: str) -> dict[str, Any]:
    """Reads one.

    Args:
        path: The file, usually in ``book/measured``.
        holds: Entry that must not be empty.
        command: What writes the file.

    Raises:
        RecordError: It is missing, not readable, or the entry is not there.
    """
    if not path.is_file():
        raise RecordError(f"{path.name} is not in {path.parent.name}; `{command}` writes it")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path.name} is not readable as JSON ({error}); run `{command}` again") from error
    if not isinstance(result, dict) or not result.get(holds):
        raise RecordError(f"{path.name} has no {holds}; run `{command}` again")
    return result


def goal_table(goals: Iterable[Mapping[str, Any]]) -> str:
    """Goals and what was measured, as a Markdown table.

    Args:
        goals: ``{"goal", "measured", "limit", "unit", "at_most", "met"}``.
    """
    lines = ["| goal | limit | measured | verdict |", "| --- | --- | --- | --- |"]
    for goal in goals:
        sign = "at most" if goal["at_most"] else "at least"
        verdict = "met" if goal["met"] else f"missed by {abs(goal['measured'] / goal['limit'] - 1):.1%}"
        limit, found = (
            f"{value}\N{NO-BREAK SPACE}{goal['unit']}".strip()
            for value in (f"{goal['limit']:g}", f"{goal['measured']:.4g}")
        )
        lines.append(f"| {goal['goal']} | {sign} {limit} | {found} | {verdict} |")
    return "\n".join(lines) + "\n"
