"""Cells of stored runs that need only the record show what this version draws; all others stay as they were."""

import json

import nbformat
import pytest
from book_fixtures import toy_record, toy_rows
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from grass_lib.report.redraw import from_record, redraw

OLD = "drawn long ago"


def cell(source, shown=True, tags=()):
    outputs = [new_output("stream", name="stdout", text=OLD)] if shown else []
    return new_code_cell(source, outputs=outputs, execution_count=7, metadata={"tags": list(tags)})


CELLS = {
    "parameters": cell('scale: str = "embedded"\nseed: int = 0\nrun_id: str = ""', shown=False, tags=["parameters"]),
    "begin": cell(
        "from grass_lib.experiments import mlp_mnist\nfrom grass_lib.report import tables\n"
        "from grass_lib.report.record import Run\nbank, by_hand = mlp_mnist, not run_id\n"
        "run = Run.begin(experiment='mlp_mnist', scale=scale, parameters={})\ngains = [1, 2]",
    ),
    "text": new_markdown_cell("## A section"),
    "notes": cell(
        "run.note('gains', gains)\nrun.note('accuracy', {'mean': gains[0]})\naccuracy = 3\nrun.note('what', bank.facts)"
    ),
    "table": cell("tables.lds_table(run.results)\nprint(len(run.results), seed, by_hand)"),
    "assigned": cell("longest = max(len(row['spec']) for row in run.results)", shown=False),
    "uses it": cell("print(longest)"),
    "noted": cell("gains"),
    "noted attribute": cell("print(bank.facts)"),
    "another attribute": cell("print(bank.name)"),
    "noted otherwise": cell("print(accuracy)"),
    "the bank": cell("print(bank)"),
    "the run": cell("print(run.run_id)"),
    "hidden": cell("print(open)"),
    "imports": cell("import os\nprint(os.getcwd())"),
    "magic": cell("%time print(seed)"),
    "fails": cell("tables.no_such_table(run.results)"),
}


@pytest.fixture
def stored(tmp_path):
    """An executed notebook and the path of its record."""
    rows = toy_rows(ks=(256,))[:1]
    record = toy_record(
        parameters={"seed": 4}, results=rows, extra={"gains": [0.5, 0.25], "accuracy": {"mean": 1}, "what": "seen"}
    )
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record.to_json()))
    return new_notebook(cells=list(nbformat.from_dict(list(CELLS.values())))), path


def test_cells_that_need_only_the_record(stored):
    notebook, record = stored
    found, names = from_record(notebook.cells, record), list(CELLS)
    wanted = ["table", "assigned", "uses it", "noted", "noted attribute", "fails"]
    assert [names[place] for place in found.places] == wanted
    assert found.noted == {"gains": "gains", "bank.facts": "what"}
    assert found.imports == "from grass_lib.report import tables"


def test_they_show_what_this_version_draws(stored):
    notebook, record = stored
    plain = nbformat.from_dict({**notebook, "cells": [CELLS["text"], CELLS["the bank"]]})
    (found, untouched) = redraw([(notebook, record), (plain, record)])
    by_name = dict(zip(CELLS, found.cells, strict=True))
    assert by_name["table"].outputs[0].text == "1 4 False\n"
    assert by_name["uses it"].outputs[0].text == "15\n"
    assert by_name["noted"].outputs[0].data["text/plain"] == "[0.5, 0.25]"
    assert by_name["noted"].outputs[0].execution_count == 7
    assert by_name["noted attribute"].outputs[0].text == "seen\n"
    changed = {name for name, one in by_name.items() if one.get("outputs") and one.outputs[0].get("text") != OLD}
    assert changed == {"table", "uses it", "noted", "noted attribute"}  # the one that fails has its own output
    assert untouched == plain
    assert notebook.cells[4].outputs[0].text == OLD


def test_nothing_of_another_run_is_shown(stored):
    _, record = stored
    first = new_notebook(cells=[cell("best = f'seed {seed}'", shown=False), cell("print(best)")])
    failing = new_notebook(cells=[cell("best = missing(run.results) if seed else 0", shown=False), cell("print(best)")])
    failing.cells.insert(0, cell("from grass_lib.report.tables import lds_table as missing", shown=False))
    failing.cells[1].source = "best = missing(seed, seed, seed)"
    assigned = new_notebook(cells=[cell("import os\nseed = seed * 100", shown=False), cell("print(seed)")])
    found = redraw([(one, record) for one in (first, failing, assigned)])
    assert [one.cells[-1].outputs[0].text for one in found] == ["seed 4\n", OLD, OLD]
