"""The page of the projection kernels is drawn from the JSON alone, and says so where there is none."""

import json
from pathlib import Path

import pytest

from grass_lib.errors import RecordError
from grass_lib.report import kernels

MEASURED = Path(__file__).parents[2] / "book" / "measured"


def test_every_part_is_written_from_the_measurement(tmp_path: Path) -> None:
    written = {path.name for path in kernels.write_page_parts(MEASURED, tmp_path)}
    page = (MEASURED.parent / "kernels.md").read_text(encoding="utf-8")
    included = {line.split("/")[-1] for line in page.splitlines() if line.startswith("```{include}")}
    assert included <= written
    goals = (tmp_path / "kernels_goals.md").read_text(encoding="utf-8")
    result = json.loads((MEASURED / kernels.RESULT).read_text(encoding="utf-8"))
    assert goals.count("| met |") == sum(goal["met"] for goal in result["goals"])
    for stem in kernels.FIGURES:
        assert (tmp_path / "figures" / f"{stem}.svg").stat().st_size > 2000


def test_a_missed_goal_says_by_how_much() -> None:
    goal = {"goal": "SJLT", "measured": 1.5, "limit": 1.0, "unit": "ms", "at_most": True, "met": False}
    assert "missed by 50.0%" in kernels.goal_table([goal])


def test_without_a_measurement_the_command_is_named(tmp_path: Path) -> None:
    kernels.write_page_parts(tmp_path, tmp_path / "out")
    assert "grass bench projections" in (tmp_path / "out" / "kernels_goals.md").read_text(encoding="utf-8")
    with pytest.raises(RecordError, match="bench"):
        kernels.load(tmp_path)
