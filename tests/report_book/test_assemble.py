from __future__ import annotations

import csv
import json
from pathlib import Path

import nbformat
import pytest
from book_fixtures import text_record, toy_record, write_run

from grass_lib.errors import UsageError
from grass_lib.experiments import EXPERIMENTS
from grass_lib.report.book import assemble, newest_verified
from grass_lib.report.pages import Page, duration, pages_in_toc, provenance, stub

EMBEDDED = Page("mlp_mnist", "embedded")


def test_pages_of_the_table_of_contents(sources: Path) -> None:
    """Every experiment has a page for each of its scales, one behind the other, and nothing else has."""
    pages = pages_in_toc(sources / "_toc.yml")
    names = list(dict.fromkeys(page.experiment for page in pages))
    assert pages == [Page(name, scale) for name in names for scale in EXPERIMENTS[name].scales]
    assert set(names) == set(EXPERIMENTS)


def test_without_any_run_every_page_is_a_stub_and_the_ledger_is_whole(sources: Path) -> None:
    assert assemble(sources) == []
    text = (sources / "book/executed/mlp_mnist_embedded.md").read_text()
    assert "grass run mlp_mnist --scale embedded" in text
    assert "grass run mlp_mnist --scale embedded" in (sources / "book/_generated/headline.md").read_text()
    rows = json.loads((sources / "book/_generated/ledger.json").read_text())
    assert sum(row["metric"] == "lds" for row in rows) == 111
    assert len(list(csv.DictReader((sources / "book/_generated/ledger.csv").open()))) == len(rows) == 223
    numbers = json.loads((sources / "book/_generated/substitutions.json").read_text())
    assert (numbers["n_published"], numbers["n_not_run"], numbers["n_measured"]) == ("111", "111", "0")


def test_newest_verified_run_is_taken_and_a_damaged_one_is_named(sources: Path) -> None:
    old = toy_record("old", finished="2026-01-01T00:01:00+00:00")
    new = toy_record("new", finished="2026-02-01T00:01:00+00:00")
    broken = toy_record("broken", finished="2026-03-01T00:01:00+00:00")
    for record in (old, new, broken):
        write_run(sources / "runs" / record.run_id, record)
    (sources / "runs/broken/record.json").write_text((sources / "runs/broken/record.json").read_text() + "\n")
    shown, refused = newest_verified(sources, EMBEDDED)
    assert shown is not None
    assert shown.record.run_id == "new"
    assert len(refused) == 1
    assert "`broken`" in refused[0]


def test_a_run_with_the_notebooks_own_parameters_comes_before_newer_ones_with_others(sources: Path) -> None:
    for name, month, changed in (("other", 4, ["seed", "specs"]), ("own", 1, []), ("elsewhere", 2, ["device"])):
        record = toy_record(name, finished=f"2026-0{month}-01T00:01:00+00:00")
        write_run(sources / "runs" / name, record, changed=changed)
    shown, refused = newest_verified(sources, EMBEDDED)
    assert shown is not None
    assert (shown.record.run_id, refused) == ("elsewhere", [])
    for name in ("own", "elsewhere"):
        (sources / "runs" / name / "record.json").unlink()
    shown, _ = newest_verified(sources, EMBEDDED)
    assert shown is not None
    assert shown.record.run_id == "other"


def test_runs_by_hand_are_passed_over_in_silence(sources: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_run(sources / "runs/mlp_mnist-manual-1", toy_record("mlp_mnist-manual-1"))
    for name in ("notebook.ipynb", "status.json"):
        (folder / name).unlink()
    assert newest_verified(sources, EMBEDDED) == (None, [])
    assert caplog.text == ""


def test_committed_run_is_shown_when_runs_has_none(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(sources / "book/measured/mlp_mnist-paper", toy_record("measured", scale="paper"))
    (shown,) = assemble(sources)
    assert shown.record.run_id == "measured"
    assert "hollow markers are the published values" in (sources / "book/_generated/headline.md").read_text()
    rows = json.loads((sources / "book/_generated/ledger.json").read_text())
    assert any(row["run_id"] == "measured" and row["measured"] is not None for row in rows)
    write_run(sources / "elsewhere/later", toy_record("later", scale="paper"))
    monkeypatch.setenv("GRASS_RUNS", str(sources / "elsewhere"))
    (shown,) = assemble(sources)
    assert shown.record.run_id == "later"


def test_a_run_on_substitutes_is_not_the_figure_of_the_introduction(sources: Path) -> None:
    write_run(sources / "runs/text", text_record("text"))
    assemble(sources)
    headline = sources / "book/_generated/headline.md"
    assert "LDS against k per layer (influence function, eFIM)" in headline.read_text()
    write_run(sources / "runs/toy", toy_record("toy"))
    assemble(sources)
    assert "LDS against k (TRAK)" in headline.read_text()
    rows = json.loads((sources / "book/_generated/ledger.json").read_text())
    measured = [row for row in rows if row["measured"] is not None]
    assert len(measured) == 24
    assert {row["verdict"] for row in measured} == {"not comparable"}
    pairs = (sources / "book/_generated/pairs.md").read_text()
    assert "{doc}`executed/gpt2_wikitext_embedded`, {doc}`executed/gpt2_wikitext_paper`" in pairs


def test_embedded_run_never_fills_the_ledger(sources: Path) -> None:
    write_run(sources / "runs/toy", toy_record("toy"))
    assemble(sources)
    rows = json.loads((sources / "book/_generated/ledger.json").read_text())
    assert {row["measured"] for row in rows} == {None}


def test_page_keeps_the_outputs_folds_the_inputs_and_says_where_numbers_come_from(sources: Path) -> None:
    folder = write_run(sources / "runs/toy", toy_record("toy", parameters={"seed": 7}), changed=["seed"])
    before = nbformat.read(folder / "notebook.ipynb", as_version=4)
    assemble(sources)
    page = nbformat.read(sources / "book/executed/mlp_mnist_embedded.ipynb", as_version=4)
    nbformat.validate(page)
    assert page.cells[0].source.startswith("# MLP + MNIST, embedded scale")
    assert "`toy`" in page.cells[1].source
    assert "`seed = 7`" in page.cells[1].source
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    assert all("hide-input" in cell.metadata.tags for cell in code)
    assert [cell.outputs for cell in code] == [cell.outputs for cell in before.cells if cell.cell_type == "code"]
    assert nbformat.read(folder / "notebook.ipynb", as_version=4) == before


def test_pages_are_made_anew_each_time(sources: Path) -> None:
    assemble(sources)
    write_run(sources / "runs/toy", toy_record("toy"))
    assemble(sources)
    stubs = {f"{page.stem}.md" for page in pages_in_toc(sources / "_toc.yml") if page != EMBEDDED}
    assert {path.name for path in (sources / "book/executed").iterdir()} == {"mlp_mnist_embedded.ipynb", *stubs}


def test_root_without_a_table_of_contents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no _toc\.yml"):
        assemble(tmp_path)


def test_texts() -> None:
    assert [duration(seconds) for seconds in (3.21, 42.4, 125, 3720)] == ["3.2 s", "42 s", "2 min 5 s", "1 h 2 min"]
    assert "not the paper's" in provenance(toy_record(), EMBEDDED)
    paper = provenance(toy_record(scale="paper"), Page("mlp_mnist", "paper"))
    assert "not the paper's" not in paper
    assert "What differs from the paper" in paper
    assert "What differs" not in provenance(toy_record(scale="paper"), Page("mlp_masks", "paper"))
    assert "drawn from it by this version" in provenance(toy_record(), EMBEDDED, redrawn=True)
    assert "because" in stub(EMBEDDED, ["`run`: because"])


def test_stored_runs_with_other_parameters_can_be_had_from_the_page(sources: Path) -> None:
    measured = sources / "book/measured"
    write_run(measured / "mlp_mnist-paper", toy_record("own", scale="paper"))
    write_run(
        measured / "mlp_mnist-paper-absolute",
        toy_record("other", scale="paper", parameters={"convention": "paper"}),
        changed=["convention"],
    )
    write_run(measured / "mlp_mnist-paper-broken", toy_record("broken", scale="paper"))
    (measured / "mlp_mnist-paper-broken" / "notebook.ipynb").write_text("{}")
    assemble(sources)
    box = nbformat.read(sources / "book/executed/mlp_mnist_paper.ipynb", as_version=4).cells[1].source
    assert "Run `own`" in box
    assert "Other stored runs: `convention=paper` ({download}`notebook" in box
    assert "broken" not in box
    assert (sources / "book/_generated/notebooks/mlp_mnist-paper-absolute.ipynb").is_file()
    assert (
        json.loads((sources / "book/_generated/records/mlp_mnist-paper-absolute.json").read_text())["run_id"] == "other"
    )
    assert "Other stored runs" not in provenance(toy_record(), EMBEDDED)
