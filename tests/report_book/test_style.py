from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from grass_lib.report.style import METHODS, NEUTRAL, PHASES, method_label, method_of, reference_method, stage_text

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def linear(colour: str) -> np.ndarray:
    value = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(first: str, second: str) -> float:
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("vision", VISION)
def test_any_two_methods_stay_apart_for_every_kind_of_colour_vision(vision: str) -> None:
    for first, second in combinations(METHODS, 2):
        seen = [lab(VISION[vision] @ linear(METHODS[name].colour)) for name in (first, second)]
        assert np.linalg.norm(seen[0] - seen[1]) > 9.5, (first, second)


@pytest.mark.parametrize("background", ["#ffffff", "#121212"])
def test_colours_are_visible_on_light_and_dark(background: str) -> None:
    assert contrast(NEUTRAL, background) > 4.2
    for name, style in METHODS.items():
        assert contrast(style.colour, background) > 2.7, name
    for name, style in PHASES.items():
        assert contrast(style.colour, background) > 2.7, name


def test_every_method_has_its_own_colour_marker_and_symbol() -> None:
    for field in ("label", "colour", "marker", "symbol"):
        assert len({getattr(style, field) for style in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize(
    ("sparsification", "projection", "method", "label"),
    [
        ("identity", "sjlt-2048", "sjlt", "SJLT"),
        ("identity", "sjlt_4-2048", "sjlt", "SJLT"),
        ("identity", "grass_8-512", "grass", "GraSS"),
        ("identity", "selective_grass-512", "selective_grass", "selective GraSS"),
        ("random_mask-32768", "sjlt-2048", "grass", "GraSS"),
        ("selective_mask-32768", "sjlt-2048", "selective_grass", "selective GraSS"),
        ("random_mask-32768", "normal-2048", "masked_normal", "random mask + normal"),
        ("selective_mask-32768", "normal-2048", "selective_masked_normal", "selective mask + normal"),
        ("normal-64*64", "identity", "normal", "LoGra (normal)"),
        ("random_mask-128*128", "sjlt-4096", "grass", "FactGraSS"),
        ("selective_mask-128*128", "sjlt-4096", "selective_grass", "selective FactGraSS"),
        ("sjlt-16*16", "identity", "sjlt", "SJLT"),
        ("random_mask-16*16", "identity", "random_mask", "random mask"),
        ("selective_mask-16*16", "identity", "selective_mask", "selective mask"),
        ("identity", "identity", "identity", "no projection"),
        ("identity", "something_new-3", "identity", "no projection"),
    ],
)
def test_method_of_a_pair_of_stages(sparsification: str, projection: str, method: str, label: str) -> None:
    assert method_of(sparsification, projection) == method
    assert method_label(sparsification, projection) == label


@pytest.mark.parametrize("vision", VISION)
def test_any_two_phases_stay_apart_for_every_kind_of_colour_vision(vision: str) -> None:
    for first, second in combinations(PHASES, 2):
        seen = [lab(VISION[vision] @ linear(PHASES[name].colour)) for name in (first, second)]
        assert np.linalg.norm(seen[0] - seen[1]) > 9.5, (first, second)
    assert len({style.hatch for style in PHASES.values()}) == len(PHASES)


def test_factored_compressions_are_compared_with_logra() -> None:
    assert [reference_method(first) for first in ("identity", "random_mask-8", "normal-8*8")] == [
        "sjlt",
        "sjlt",
        "normal",
    ]


def test_stage_text_leaves_identity_out() -> None:
    assert stage_text("identity", "sjlt-4") == "sjlt-4"
    assert stage_text("random_mask-8", "sjlt-4") == "random_mask-8->sjlt-4"
    assert stage_text("normal-2*2", "identity") == "normal-2*2"
    assert stage_text("identity", "identity") == "identity"
