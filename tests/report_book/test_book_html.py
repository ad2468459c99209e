from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from html_check import check_html


def test_pages_have_no_broken_link_no_double_id_and_load_nothing_from_outside(built_book: Path) -> None:
    assert check_html(built_book) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('<p id="a"></p><p id="a"></p>', "appears twice"),
        ('<script src="https://example.org/x.js"></script>', "from outside"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "from outside"),
        ('<a href="missing.html">x</a>', "does not exist"),
        ('<a href="#nowhere">x</a>', "no such anchor"),
    ],
)
def test_checker_sees_each_kind_of_fault(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "page.html").write_text(f"<html><body>{text}</body></html>")
    problems = check_html(tmp_path)
    assert len(problems) == 1
    assert complaint in problems[0]


def test_no_script_of_thebe_and_plotly_only_where_it_is_used(built_book: Path) -> None:
    run = (built_book / "book/executed/mlp_mnist_embedded.html").read_text()
    method = (built_book / "book/method.html").read_text()
    assert "thebe" not in run.lower()
    assert "unpkg.com" not in run
    assert "plotly.min.js" in run
    assert "itables.js" in run
    assert "plotly.min.js" not in method
    assert "itables.js" not in method
    assert "mathjax/tex-svg-full.js" in method


def test_inputs_are_folded_and_the_notebook_is_downloadable(built_book: Path) -> None:
    page = (built_book / "book/executed/mlp_mnist_embedded.html").read_text()
    assert page.count("tag_hide-input") >= 7
    assert "Show code cell source" in page
    source = built_book / "_sources/book/executed/mlp_mnist_embedded.ipynb"
    assert len(json.loads(source.read_text())["cells"]) > 7
    downloads = {path.name for path in (built_book / "_downloads").rglob("*") if path.is_file()}
    assert {"mlp_mnist_embedded.ipynb", "mlp_mnist_embedded.json", "ledger.csv", "ledger.json"} <= downloads


def test_progress_bars_are_left_out_of_the_page(built_book: Path) -> None:
    page = (built_book / "book/executed/mlp_mnist_embedded.html").read_text()
    assert "grass-run-complete" in page
    assert "training: 50%" not in page


def test_numbers_of_the_prose_were_filled_in(built_book: Path) -> None:
    ledger = (built_book / "book/ledger.html").read_text()
    assert "Of 111 published LDS values" in ledger
    for page in built_book.rglob("book/**/*.html"):
        assert "{{" not in page.read_text().split("<main", 1)[-1].split("</main>")[0].split("<script")[0]


def test_page_without_a_run_says_so_and_names_the_command(built_book: Path) -> None:
    page = (built_book / "book/executed/mlp_mnist_paper.html").read_text()
    assert "Not run yet" in page
    assert "--scale" in page


def test_a_markdown_table_of_an_output_is_a_table(built_book: Path) -> None:
    for name in ("mlp_mnist_embedded", "gpt2_wikitext_paper"):
        page = (built_book / f"book/executed/{name}.html").read_text()
        assert re.search(r"<td[^>]*>\s*(<p>)?beside", page)
        assert "| --- |" not in page
