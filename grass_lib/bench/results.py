"""What all benchmarks' results have: goals, versions, and a JSON file that the book is drawn from."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.report.environment import installed


def judged(goal: str, measured: float | None, limit: float, unit: str, at_most: bool) -> dict[str, Any]:
    """A goal beside what was measured.

    Args:
        goal: In words.
        measured: None where there was nothing to compare: the goal is missed.
        limit: Of the goal.
        unit: Of both, empty for none.
        at_most: Whether the limit is the highest value allowed, and not the lowest.

    Returns:
        ``{"goal", "measured", "limit", "unit", "at_most", "met"}``.
    """
    met = measured is not None and (measured <= limit if at_most else measured >= limit)
    return {"goal": goal, "measured": measured, "limit": limit, "unit": unit, "at_most": at_most, "met": met}


def goal_line(goal: Mapping[str, Any]) -> str:
    """A goal of `judged` as one line of text."""
    verdict, sign = ("met" if goal["met"] else "MISSED"), ("<=" if goal["at_most"] else ">=")
    value = "nothing" if goal["measured"] is None else f"{goal['measured']:.4g}"
    return f"{verdict}: {goal['goal']}: {value} {sign} {goal['limit']:g} {goal['unit']}".rstrip()


def versions(*packages: str) -> dict[str, str]:
    """Of Python, PyTorch and those of some packages that are installed.

    Args:
        packages: Their names.
    """
    import torch  # not where goals alone are asked for, as pages do

    return {"python": platform.python_version(), "torch": torch.__version__, **installed(packages)}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result as JSON; makes the folder.

    Args:
        result: What a benchmark gives.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
