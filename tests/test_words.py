"""Lists and comparisons in sentences."""

from __future__ import annotations

import pytest

from grass_lib.words import faster, few


@pytest.mark.parametrize(
    ("percent", "text"),
    [
        (133.6, "134 % faster than LoGra"),
        (-12.2, "12 % slower than LoGra"),
        (-0.4, "as fast as LoGra"),
        (0.0, "as fast as LoGra"),
    ],
)
def test_a_difference_of_speeds_names_its_direction(percent: float, text: str) -> None:
    assert faster(percent, "LoGra") == text
    assert faster(percent) == text.removesuffix(" than LoGra").removesuffix(" as LoGra")


def test_a_long_list_ends_with_a_count() -> None:
    assert few(["a", "b"]) == "a, b"
    assert few(range(7), 2) == "0, 1 and 5 more"
