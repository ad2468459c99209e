"""Figures, tables and the gallery of influence functions with factored compressions."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from book_fixtures import factored_rows, text_record, toy_passage, toy_passages, toy_ranked, toy_rows

from grass_lib.attribution.ranking import topk
from grass_lib.errors import UsageError
from grass_lib.report.figures import draw_record, lds_figure, main, time_figure
from grass_lib.report.influence_tables import split_figure, split_rows, split_table
from grass_lib.report.interactive import lds_figure_html
from grass_lib.report.passages import MAX_EXCERPTS, excerpt, passages_html
from grass_lib.report.published import published_rows
from grass_lib.report.style import METHODS, PHASES
from grass_lib.report.tables import lds_table, table_html, time_table

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ["random mask", "SJLT", "LoGra (normal)", "FactGraSS"]


def published() -> list[dict[str, Any]]:
    return [row for row in published_rows("gpt2_wikitext") if "selective" not in row["sparsification"]]


def test_factored_rows_are_drawn_under_their_names_in_the_colours_of_the_flat_types() -> None:
    figure = lds_figure(factored_rows(), published=published())
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [*NAMES, "published"]
    assert axes.get_xlabel() == "k per layer, compressed dimension"
    assert lds_figure(toy_rows()).axes[0].get_xlabel() == "k, compressed dimension"
    dashed = [line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
    wanted = [[row["lds"] for row in published()[start : start + 3]] for start in (0, 3, 9, 6)]
    assert [list(line.get_ydata()) for line in dashed] == wanted
    colours = [METHODS[name].colour for name in ("random_mask", "sjlt", "normal", "grass")]
    assert [line.get_color() for line in dashed] == colours
    assert [text.get_text() for text in time_figure(factored_rows()).axes[0].get_legend().get_texts()] == NAMES


def test_interactive_figure_names_factored_methods() -> None:
    text = lds_figure_html(factored_rows(), published=published())
    names = [json.loads(f'"{name}"') for name in re.findall(r'"name":"((?:[^"\\]|\\.)*)"', text)]
    assert names == [*NAMES, "published, hollow", *(f"{label}, published" for label in NAMES)]
    assert "k per layer" in text
    assert "k per layer" not in lds_figure_html(toy_rows())


def test_tables_of_factored_rows_count_k_per_layer() -> None:
    table = lds_table(factored_rows())
    assert list(table.columns[:3]) == ["Method", "k per layer", "LDS"]
    assert list(dict.fromkeys(table["Method"])) == NAMES
    assert "k" in lds_table(toy_rows())


def test_times_are_divided_by_those_of_logra_ours_and_the_published_ones() -> None:
    table = time_table(factored_rows(), published=published()).set_index("Compression")
    assert table.loc["random_mask-64*64->sjlt-1024", "Times LoGra"] == pytest.approx(11 / 8)
    assert table.loc["random_mask-64*64->sjlt-1024", "As published"] == pytest.approx(7.4161 / 20.9835)
    assert set(table[table["Method"] == "LoGra (normal)"]["As published"]) == {1.0}
    assert "As published" not in time_table(factored_rows())
    assert "Times SJLT" in time_table(factored_rows(), reference="sjlt")


def test_split_table_has_every_phase_their_sum_and_the_throughput() -> None:
    rows = factored_rows()
    table = split_table([*rows, *({**row, "damping_convention": "paper"} for row in rows)])
    assert len(table) == len(rows)
    assert "Compression" not in table
    first = table[(table["Method"] == "LoGra (normal)") & (table["k per layer"] == 1024)].iloc[0]
    phases = ["Forward / backward (s)", "Compression (s)", "Writing (s)", "Curvature (s)", "Scoring (s)"]
    assert list(table.columns[2:]) == [*phases, "Sum (s)", "Tokens/s, caching"]
    assert [first[name] for name in phases] == [20.0, 8.0, 1.0, 3.0, 3.0]
    assert first["Sum (s)"] == 35.0
    assert "86,000" in table_html(table, "dt-split")


def test_split_table_shows_the_compression_where_two_rows_would_look_alike() -> None:
    row = factored_rows()[-1]
    other = {**row, "sparsification": "random_mask-256*256"}
    assert list(split_table([row, other])["Compression"]) == [
        "random_mask-128*128->sjlt-4096",
        "random_mask-256*256->sjlt-4096",
    ]


def test_a_phase_of_another_name_is_not_lost() -> None:
    row = factored_rows()[0]
    table = split_table([{**row, "seconds": {"gradients": 1.0, "probing": 0.5, "waiting": 0.25}}])
    assert table["Other (s)"].tolist() == [0.75]
    assert table["Sum (s)"].tolist() == [1.75]


def test_split_figure_stacks_the_phases() -> None:
    rows = factored_rows()
    figure = split_figure(rows)
    axes = figure.axes[0]
    widths = np.array([[bar.get_width() for bar in container] for container in axes.containers])
    ordered = split_rows(rows)
    assert np.array_equal(widths.T, [[row["seconds"][name] for name in PHASES] for row in ordered])
    lefts = np.array([[bar.get_x() for bar in container] for container in axes.containers])
    assert np.allclose(lefts[1:], np.cumsum(widths, axis=0)[:-1])
    assert [text.get_text() for text in axes.texts] == [f"{row['tokens_per_second']:,.0f}" for row in ordered]
    assert axes.get_yticklabels()[0].get_text() == "random mask, 256"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [style.label for style in PHASES.values()]


@pytest.mark.parametrize("draw", [split_table, split_figure])
def test_rows_without_seconds_by_phase_are_refused(draw: Any) -> None:
    with pytest.raises(UsageError, match=r"no result row has seconds by phase.*gradients"):
        draw(toy_rows())


def test_committed_record_of_the_pair_is_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "measured/gpt2_wikitext-paper"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(text_record().to_json()))
    assert main(["--measured", str(tmp_path / "measured"), "--output", str(tmp_path / "figures")]) == 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"gpt2_wikitext_{kind}.{suffix}"
        for kind in ("lds", "projection_time", "time_split")
        for suffix in ("png", "svg", "pdf")
    }


def test_a_variant_beside_the_committed_run_does_not_draw_over_it(tmp_path: Path) -> None:
    rows = [{**row, "lds": {**row["lds"], "mean": 0.0, "interval": None}} for row in factored_rows()]
    runs = {"gpt2_wikitext-paper": text_record(), "gpt2_wikitext-paper-other": text_record(results=rows)}
    for name, record in runs.items():
        (tmp_path / "measured" / name).mkdir(parents=True)
        (tmp_path / "measured" / name / "record.json").write_text(json.dumps(record.to_json()))
    assert main(["--measured", str(tmp_path / "measured"), "--output", str(tmp_path / "figures")]) == 0
    wanted = draw_record(text_record(), tmp_path / "wanted")
    assert [(tmp_path / "figures" / path.name).read_bytes() for path in wanted] == [
        path.read_bytes() for path in wanted
    ]


def test_figures_are_the_same_bytes_each_time_and_a_run_without_times_has_no_figure_of_them(tmp_path: Path) -> None:
    first = draw_record(text_record(), tmp_path / "a")
    second = draw_record(text_record(), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    rows = [{**row, "projection_seconds": None, "seconds": {}} for row in factored_rows()]
    assert [path.name for path in draw_record(text_record(results=rows), tmp_path, ("png",))] == [
        "gpt2_wikitext_lds.png"
    ]


class Shown(HTMLParser):
    """Text by CSS class, and every tag that opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.classes: set[str] = set()
        self.attributes: set[str] = set()
        self.found: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        name = dict(attrs).get("class") or ""
        self.classes |= set(name.split())
        self._open.append(name or tag)
        if name:
            self.found.setdefault(name, [])

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.found.setdefault(self._open[-1] if self._open else "", []).append(data)


def test_gallery_sets_each_query_beside_what_helped_and_what_harmed() -> None:
    scores = torch.tensor([[0.5, -1.0], [-0.25, 2.0], [0.125, 0.0], [-4.0, 0.5]])
    texts = ["first <b>passage</b>", "second & last", "third\n\n = Heading = \tend", "$ 4 and $ 5"]
    page = passages_html(
        ["who?", "what?"], texts.__getitem__, topk(scores, 2), titles=["one", "two"], source="a book", licence="CC0"
    )
    shown = Shown(page)
    assert shown.found["gp-name"] == ["one", "two"]
    assert shown.found["gp-heading"] == ["helped most", "harmed most"] * 2
    assert shown.found["gp-score"] == ["+0.5", "+0.125", "-4", "-0.25", "+2", "+0.5", "-1", "+0"]
    assert shown.found["gp-index"] == [f"training passage {index}" for index in (0, 2, 3, 1, 1, 3, 0, 2)]
    assert shown.found["p"] == [
        "who?",
        *[texts[0], "third = Heading = end", texts[3], texts[1]],
        "what?",
        *[texts[1], texts[3], texts[0], "third = Heading = end"],
    ]
    assert shown.found["gp-source"] == ["Passages: a book; licence: CC0."]
    widths = re.findall(r"width:([\d.]+)%", page)
    assert widths == ["12.5", "3.1", "100.0", "6.2", "100.0", "25.0", "50.0", "0.0"]


def test_gallery_has_no_script_no_tooltip_and_keeps_formulas_away() -> None:
    page = toy_passages()
    shown = Shown(page)
    assert not {"script", "style", "b"} & set(shown.tags)
    assert "title" not in shown.attributes
    assert {"mathjax_ignore", "tex2jax_ignore"} <= shown.classes
    assert "<style>" in toy_passages(embed=True)


def test_every_class_of_the_gallery_is_styled_in_the_book_and_by_hand() -> None:
    classes = Shown(toy_passages()).classes - {"mathjax_ignore", "tex2jax_ignore"}
    book = (REPOSITORY / "book/_static/book.css").read_text()
    by_hand = toy_passages(embed=True).split("</style>")[0]
    for name in classes - {"gp-side"}:
        assert f".{name}" in book, name
        assert f".{name}" in by_hand, name


def test_passages_may_come_as_a_mapping() -> None:
    ranked = SimpleNamespace(indices=np.array([[[7], [9]]]), scores=np.array([[[1.0], [-1.0]]]))
    page = passages_html(["q"], {7: "seven", 9: "nine"}, ranked)
    assert "seven" in page
    assert "gp-source" not in page
    with pytest.raises(UsageError, match="passage 9"):
        passages_html(["q"], {7: "seven"}, ranked)


def test_excerpt_ends_at_a_word() -> None:
    assert excerpt("a  b\n\nc\x00d") == "a b c d"
    assert excerpt("one two three", 9) == "one two…"
    assert excerpt("one two", 7) == "one two"
    assert excerpt("x" * 50, 10) == "x" * 9 + "…"
    assert all(len(excerpt(toy_passage(index))) <= 280 for index in range(20))


@pytest.mark.parametrize(
    ("n_query", "per_side", "options", "complaint"),
    [
        (7, 4, {}, f"make 63 excerpts, expected 1 to {MAX_EXCERPTS}"),
        (2, 3, {"per_side": 4}, "per_side is 4, expected 1 to 3"),
        (2, 3, {"per_side": 0}, "per_side is 0"),
        (2, 3, {"titles": ["one"]}, "1 titles for 2 ranked queries"),
    ],
)
def test_gallery_refuses_what_it_cannot_show(
    n_query: int, per_side: int, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        passages_html(["q"] * n_query, toy_passage, toy_ranked(n_query, 40, per_side), **options)


def test_gallery_refuses_scores_that_are_no_numbers_and_wrong_shapes() -> None:
    ranked = toy_ranked(1, 40, 2)
    ranked.scores[0, 0, 0] = np.nan
    with pytest.raises(UsageError, match="not finite"):
        passages_html(["q"], toy_passage, ranked)
    with pytest.raises(UsageError, match=r"shape \(4,\)"):
        passages_html(["q"], toy_passage, SimpleNamespace(indices=np.zeros(4, int), scores=np.zeros(4)))
