"""Words and numbers of the page on scaling."""

import pytest

from grass_lib.report.scaling import goal_table


def goal(name, measured, limit, unit="", at_most=True):
    met = measured is not None and (measured <= limit if at_most else measured >= limit)
    return {"goal": name, "measured": measured, "limit": limit, "unit": unit, "at_most": at_most, "met": met}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (goal("kill: worst row against one rank's", 0.0, 1e-2), "| after a lost rank: worst row against one rank's |"),
        (
            goal("fsdp: worst score", 3.546e-07, 1e-5),
            "| a model over both: worst score | at most 1e-5 | 3.55e-7 | met |",
        ),
        (goal("caching", 1.974, 1.9, "x", False), "| caching | at least 1.9 x | 1.97 x | met |"),
        (goal("goes on", 1.0, 1.0, "", False), "| goes on | yes | yes | met |"),
        (goal("goes on", 0.0, 1.0, "", False), "| goes on | yes | no | missed |"),
        (goal("after", None, 60.0, "s"), "| after | at most 60 s | nothing to compare | missed |"),
    ],
)
def test_goals(given, line):
    assert line in goal_table({"goals": [given]})
