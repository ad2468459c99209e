from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from book_fixtures import CEILING, toy_images, toy_ranked, toy_record, toy_rows

from grass_lib.errors import UsageError
from grass_lib.report.figure_files import save_figure
from grass_lib.report.figures import comparable, draw_record, lds_figure, main, time_figure
from grass_lib.report.galleries import MAX_THUMBNAILS, image_gallery, score_text
from grass_lib.report.interactive import lds_figure_html, published_figure_html
from grass_lib.report.published import published_rows
from grass_lib.report.style import METHODS
from grass_lib.report.tables import (
    damping_text,
    interval_text,
    lds_table,
    pick_rows,
    seconds_text,
    table_html,
    time_table,
)


def lines(figure: Any) -> dict[str, Any]:
    axes = figure.axes[0]
    legend = axes.get_legend()
    ordered = [text.get_text() for text in legend.get_texts()]
    handles, labels = axes.get_legend_handles_labels()
    drawn = [handle[0] if hasattr(handle, "lines") else handle for handle in handles]
    found = dict(zip(labels, drawn, strict=True))
    return {label: found[label] for label in ordered}


def test_lds_figure_draws_the_rows_in_the_colours_of_the_methods() -> None:
    near = {"mean": 0.45, "interval": [0.4, 0.5]}
    drawn = lines(lds_figure(toy_rows(), noise_ceiling=near))
    wanted = [row["lds"]["mean"] for row in toy_rows() if row["projection"].startswith("sjlt")]
    assert list(drawn["SJLT"].get_ydata()) == wanted
    assert drawn["SJLT"].get_color() == METHODS["sjlt"].colour
    assert drawn["SJLT"].get_marker() == METHODS["sjlt"].marker
    assert set(drawn["noise ceiling"].get_ydata()) == {0.45}
    assert list(drawn) == ["random mask", "SJLT", "FJLT", "dense normal", "dense Rademacher", "GraSS", "noise ceiling"]


def test_a_ceiling_far_above_is_written_not_drawn() -> None:
    figure = lds_figure(toy_rows(), noise_ceiling={"mean": 0.9, "interval": [0.85, 0.95]})
    assert "noise ceiling" not in lines(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["noise ceiling 0.90 (0.85 to 0.95), above the figure"]
    assert figure.axes[0].get_ylim()[1] < 0.6


def test_published_fjlt_is_drawn_as_the_rademacher_projection_that_it_was() -> None:
    published = [row for row in published_rows("mlp_mnist") if row["projection"].startswith("fjlt")]
    figure = lds_figure(toy_rows((2048, 4096, 8192)), published=published)
    drawn = lines(figure)
    assert "published" in drawn
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert len(dashed) == 1
    assert list(dashed[0].get_ydata()) == [row["lds"] for row in published]
    assert dashed[0].get_color() == METHODS["rademacher"].colour
    assert dashed[0].get_markerfacecolor() == "none"
    assert [row["projection"] for row in published] == ["fjlt-2048", "fjlt-4096", "fjlt-8192"]
    assert [row["projection"] for row in comparable(published)] == [f"rademacher-{k}" for k in (2048, 4096, 8192)]


def test_time_figure_draws_seconds() -> None:
    drawn = lines(time_figure(toy_rows()))
    assert list(drawn["FJLT"].get_ydata()) == [
        row["projection_seconds"] for row in toy_rows() if row["projection"].startswith("fjlt")
    ]


def test_a_run_with_two_conventions_and_baselines_is_drawn_once() -> None:
    rows = toy_rows()
    paper = [{**row, "damping_convention": "paper"} for row in rows]
    baseline = [{**rows[0], "attributor": "tracin", "damping_convention": None}]
    assert pick_rows([*rows, *paper, *baseline]) == rows
    assert pick_rows([*rows, *paper], convention="paper") == paper
    assert pick_rows([*rows, *baseline], attributor="tracin") == baseline


def test_saved_figures_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    first = save_figure(lds_figure(toy_rows()), "lds", tmp_path / "a")
    second = save_figure(lds_figure(toy_rows()), "lds", tmp_path / "b")
    assert [path.suffix for path in first] == [".png", ".svg", ".pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_paper_scale_record_is_drawn_with_published_values(tmp_path: Path) -> None:
    files = draw_record(toy_record(scale="paper"), tmp_path)
    assert {path.name for path in files} == {
        f"mlp_mnist_{kind}.{suffix}" for kind in ("lds", "projection_time") for suffix in ("png", "svg", "pdf")
    }
    assert draw_record(toy_record(), tmp_path)[0].name == "mlp_mnist_embedded_lds.png"


def test_command_line_without_a_record_says_what_to_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--measured", str(tmp_path), "--output", str(tmp_path / "out")]) == 1
    assert "grass run mlp_mnist --scale paper" in caplog.text
    assert not (tmp_path / "out").exists()


def test_lds_table_has_values_and_intervals() -> None:
    table = lds_table(toy_rows())
    assert "Attributor" not in table
    assert len(table) == len(toy_rows())
    row = table[table["Compression"] == "sjlt-512"].iloc[0]
    assert (row["Method"], row["k"], row["LDS"]) == ("SJLT", 512, 0.25)
    assert row["95 % interval"] == "0.2200 to 0.2850"
    both = lds_table([{**toy_rows()[0], "attributor": "tracin", "damping": None}, *toy_rows()])
    assert list(dict.fromkeys(both["Attributor"])) == ["TRAK", "TracIn"]
    assert list(both[both["Attributor"] == "TracIn"]["Damping"]) == [""]


def test_time_table_compares_at_the_same_k_and_shows_a_compression_once() -> None:
    rows = toy_rows()
    table = time_table([*rows, *({**row, "damping_convention": "paper"} for row in rows)])
    assert len(table) == len(rows)
    seconds = {row["projection"]: row["projection_seconds"] for row in rows}
    for _, row in table.iterrows():
        assert row["Times SJLT"] == pytest.approx(seconds[row["Compression"]] / seconds[f"sjlt-{row['k']}"])
    alone = time_table([row for row in rows if not row["projection"].startswith("sjlt")])
    assert alone["Times SJLT"].isna().all()
    assert "nan" not in table_html(alone, "dt-alone")


def test_numbers_and_their_intervals_have_the_same_digits() -> None:
    rows = [{**toy_rows()[0], "projection_seconds": 18.71, "projection_seconds_interval": [18.54, 1234.5]}]
    assert ">18.7<" in table_html(time_table(rows), "dt-time")
    assert ">18.5 to 1,234<" in table_html(time_table(rows), "dt-time")
    assert [seconds_text(value) for value in (0.0, 0.8, 99.96, 100.2)] == ["0.00", "0.800", "100", "100"]
    assert [score_text(value) for value in (3012.4, -0.01234, 99.5)] == ["+3,012", "-0.0123", "+99.5"]


def test_an_lds_is_rounded_once() -> None:
    lds = {**toy_rows()[0]["lds"], "mean": 0.40895007, "interval": [0.38, 0.43]}
    text = table_html(lds_table([{**toy_rows()[0], "lds": lds}]), "dt-lds")
    assert ">0.4090<" in text
    assert ">0.3800 to 0.4300<" in text


def traces(text: str) -> list[dict[str, Any]]:
    start = text.index("[{", text.index("Plotly.newPlot"))
    return json.JSONDecoder().raw_decode(text[start:])[0]


def test_published_lines_share_one_entry_and_wait_where_there_are_many() -> None:
    rows = toy_rows((2048, 4096, 8192))
    drawn = traces(lds_figure_html(rows, published=published_rows("mlp_mnist")))
    theirs = [trace for trace in drawn if trace.get("legendgroup") == "published"]
    assert [trace["name"] for trace in theirs if trace.get("showlegend", True)] == ["published, hollow"]
    assert all(trace["visible"] is True for trace in theirs)
    assert not any("selective" in trace["name"] for trace in drawn), "nothing was measured on that line"
    colours = {trace["name"]: trace["line"]["color"] for trace in drawn}
    assert all(colours[name.removesuffix(", published")] == colour for name, colour in list(colours.items())[6:-1])
    masks = [
        {**row, "sparsification": f"random_mask-{size}"}
        for row in rows
        if row["projection"].startswith(("sjlt", "normal"))
        for size in (32768, 131072)
    ]
    crowd = traces(lds_figure_html([*rows, *masks], published=published_rows("resnet9_cifar2")))
    theirs = [trace for trace in crowd if trace.get("legendgroup") == "published"]
    assert {trace["visible"] for trace in theirs} == {"legendonly"}
    grass = [trace for trace in theirs if trace["name"].startswith("GraSS, ")]
    assert len(grass) == 2
    assert len({trace["line"]["dash"] for trace in grass}) == 2
    assert len({trace["marker"]["size"] for trace in grass}) == 2


@pytest.mark.parametrize("interval", [None, (None, None), (float("nan"), 1.0)])
def test_an_interval_that_is_not_there_is_empty(interval: Any) -> None:
    assert interval_text(interval) == ""


def test_html_fragments_load_nothing_and_are_small_unless_embedded() -> None:
    table = table_html(lds_table(toy_rows()), "dt-a")
    figure = lds_figure_html(toy_rows(), noise_ceiling=CEILING)
    published = published_figure_html(published_rows())
    for text in (table, figure, published):
        assert "<script src" not in text
        assert "import {" not in text
        assert len(text) < 120_000
    assert len(table_html(lds_table(toy_rows()), "dt-a", embed=True)) > 500_000
    assert len(lds_figure_html(toy_rows(), embed=True)) > 3_000_000


@pytest.mark.parametrize(("mean", "hidden"), [(0.45, False), (0.9, True)])
def test_a_ceiling_far_above_waits_in_the_legend(mean: float, hidden: bool) -> None:
    text = lds_figure_html(toy_rows(), noise_ceiling={"mean": mean, "interval": None})
    assert "noise ceiling" in text
    assert ('"visible":"legendonly"' in text) is hidden


def test_ids_must_not_meet_those_of_sections() -> None:
    with pytest.raises(UsageError, match=r"dt-.*'results'"):
        table_html(lds_table(toy_rows()), "results")
    with pytest.raises(UsageError, match=r"plotly-.*'results'"):
        lds_figure_html(toy_rows(), div_id="results")


def test_gallery_shows_the_ranked_images_with_signed_scores() -> None:
    ranked = toy_ranked()
    train = toy_images(40, 1)
    figure = image_gallery(toy_images(6), train, ranked, queries=[2], train_labels=np.arange(40) % 10, per_side=3)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 7
    first = ranked.indices[2, 0, 0]
    assert np.array_equal(np.asarray(shown[1].images[0].get_array()), train[first])
    assert shown[1].get_title() == str(first % 10)
    assert shown[1].get_xlabel() == f"{ranked.scores[2, 0, 0]:+.2g}"
    assert shown[1].get_xlabel().startswith("+")
    assert shown[4].get_xlabel().startswith("-")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"queries": []}, "make 0"),
        ({"queries": list(range(6)), "per_side": 5}, f"make 66, expected 1 to {MAX_THUMBNAILS}"),
        ({"queries": [6]}, r"\[6\] do not exist"),
        ({"queries": [0], "per_side": 6}, "per_side = 6"),
    ],
)
def test_gallery_refuses_what_it_cannot_show(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        image_gallery(toy_images(6), toy_images(40), toy_ranked(), **options)


def test_gallery_refuses_scores_of_the_wrong_shape() -> None:
    flat = SimpleNamespace(indices=np.zeros((6, 4), int), scores=np.zeros((6, 4)))
    with pytest.raises(UsageError, match=r"shape \(6, 4\)"):
        image_gallery(toy_images(6), toy_images(40), flat, queries=[0])


def test_a_damping_at_the_edge_of_its_grid_is_marked() -> None:
    assert damping_text({"damping": 0.1}) == "0.1"
    assert damping_text({"damping": 1e-7, "damping_at_edge": True}) == "1e-07, edge"
    assert damping_text({"damping": None, "damping_at_edge": None}) == ""
