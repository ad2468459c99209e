"""Tables and figures of the study of masks, against the rows that they are drawn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from book_fixtures import toy_record, toy_rows

from grass_lib.report import masks
from grass_lib.report.figures import draw_record
from grass_lib.report.style import MASK_WAYS

KS = (64, 256)
WAYS = ("random", "energy", "learned")


def results() -> list[dict[str, Any]]:
    base = toy_rows()[0]
    rows = []
    for place, way in enumerate(WAYS):
        for seed in range(1 if way == "energy" else 2):
            for shared in (False, True):
                for k in KS:
                    lds = {**base["lds"], "mean": 0.1 * place + 0.01 * seed + 0.001 * shared + k / 1e5}
                    row = {**base, "projection": f"selective_mask-{k}", "spec": f"selective_mask-{k}", "k": k}
                    rows.append({**row, "way": way, "seed": seed, "shared": shared, "lds": lds})
    return rows


CORRELATIONS = [
    {"way": way, "seed": seed, "k": k, "correlation": 0.2 + 0.1 * place + 0.02 * seed + k / 1000}
    for place, way in enumerate(WAYS)
    for seed in range(2)
    for k in KS
]
DIFFERENCES = [
    {"way": way, "shared": shared, "k": k, "mean": 0.01 * place - 0.005, "interval": [-0.02, 0.01 * place + 0.01]}
    for place, way in enumerate(WAYS[1:])
    for shared in (False, True)
    for k in KS
]
PIXELS = {way: (np.eye(28, dtype=int) * place).tolist() for place, way in enumerate(WAYS)}


def test_the_table_has_means_over_seeds_and_the_paired_difference() -> None:
    table = masks.mask_table(results(), CORRELATIONS, DIFFERENCES)
    assert len(table) == 3 * 2 * 2
    row = table[(table["Chosen by"] == "learned") & (table["k"] == 256) & (table["Masks"] == "one for all")].iloc[0]
    assert row["LDS"] == pytest.approx(0.2 + 0.005 + 0.001 + 256 / 1e5)
    assert row["Correlation"] == pytest.approx(0.2 + 0.2 + 0.01 + 0.256)
    assert (row["Minus random"], row["95 % interval"], row["Seeds"]) == ("+0.0050", "-0.020 to +0.020", 2)
    random = table[table["Chosen by"] == "random"]
    assert set(random["Minus random"]) == {""}


def test_costs_are_medians() -> None:
    fits = [{"way": "energy", "k": 64, "seconds": value} for value in (3.0, 1.0, 2.0)]
    row = masks.cost_table(fits).iloc[0]
    assert (row["Seconds, median"], row["Lowest to highest"], row["Masks"]) == (2.0, "1.00 to 3.00", 3)


def test_shares_are_of_each_weight() -> None:
    table = masks.share_table({"energy": {"fc1.weight": (5, 1000), "fc1.bias": (1, 10)}})
    assert list(table["energy"]) == ["0.50%", "10.00%"]
    assert list(table["Coordinates"]) == ["1,000", "10"]


def test_masks_of_layers_have_a_row_for_each_size() -> None:
    kept = [{"stage": "selective_mask-4*4", "method": "learned", "held_out": 0.5, "energy": 0.4, "random": 0.3}]
    row = masks.layer_mask_table(kept).iloc[0]
    assert (row["Masks"], row["These masks"], row["By energy"], row["Random"]) == ("selective_mask-4*4", 0.5, 0.4, 0.3)


def test_correlation_figure_has_a_line_for_each_way_and_a_dot_for_each_seed() -> None:
    (axes,) = masks.correlation_figure(CORRELATIONS).axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == [MASK_WAYS[way].label for way in WAYS]
    assert list(lines["energy"].get_ydata()) == pytest.approx([0.31 + k / 1000 for k in KS])
    dots = [line for line in axes.lines if line.get_label().startswith("_")]
    assert sum(len(line.get_xdata()) for line in dots) == len(CORRELATIONS)


def test_difference_figure_has_a_panel_for_each_kind_of_sharing() -> None:
    panels = masks.difference_figure(DIFFERENCES).axes
    assert [axes.get_title() for axes in panels] == [masks.SHARING[False], masks.SHARING[True]]
    first = panels[0].containers[1]
    assert list(first.lines[0].get_ydata()) == [0.005, 0.005]
    low, high = first.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((-0.02, 0.02))


def test_pixels_share_one_scale_and_say_how_many_are_kept() -> None:
    figure = masks.pixel_figure({way: np.asarray(image) for way, image in PIXELS.items()}, k=64)
    images = [axes for axes in figure.axes if axes.images]
    assert [axes.images[0].get_clim() for axes in images] == [(0.0, 2.0)] * 3
    assert [axes.get_xlabel() for axes in images] == ["0 of 64", "28 of 64", "56 of 64"]
    assert np.array_equal(images[2].images[0].get_array(), np.eye(28) * 2)


def test_figures_of_a_record_are_files(tmp_path: Path) -> None:
    extra = {"correlations": CORRELATIONS, "differences": DIFFERENCES, "pixels": PIXELS}
    record = toy_record("mlp_masks-paper-toy", "paper", experiment="mlp_masks", results=results(), extra=extra)
    paths = draw_record(record, tmp_path, ["svg"])
    assert [path.name for path in paths] == [
        f"mlp_masks_{kind}.svg" for kind in ("correlation", "lds_difference", "pixels")
    ]
    assert "Which coordinates matter" in paths[0].read_text()
