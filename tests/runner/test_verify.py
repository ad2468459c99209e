"""Each of the five tests fails alone on a run that is otherwise whole."""

import hashlib
import json

import pytest

from grass_lib.runner import verify_run
from grass_lib.runner.verify import in_one_sentence, unfinished


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def only_problem(folder):
    problems = verify_run(folder)
    assert len(problems) == 1, problems
    return problems[0]


def seal(folder):
    """Makes the notebook's hash fit again, so that what is tested is not merely that something changed."""
    digest = hashlib.sha256((folder / "notebook.ipynb").read_bytes()).hexdigest()
    edit(folder / "status.json", lambda status: status.update(notebook_sha256=digest))


def test_whole_run(finished):
    assert verify_run(finished) == []
    assert verify_run(str(finished)) == []


def test_exit_code(finished):
    edit(finished / "status.json", lambda status: status.update(exit_code=137))
    assert only_problem(finished).startswith("exit code is 137, expected 0")


def test_no_stamp(finished):
    (finished / "status.json").unlink()
    assert only_problem(finished).startswith("no exit code: status.json is missing")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"exit_code": 0}'])
def test_damaged_stamp(finished, content):
    (finished / "status.json").write_text(content)
    assert only_problem(finished).startswith("no exit code")


def test_exit_code_must_be_a_number(finished):
    edit(finished / "status.json", lambda status: status.update(exit_code=False))
    assert only_problem(finished).startswith("exit code is False")


def test_cell_without_execution_count(finished):
    edit(finished / "notebook.ipynb", lambda notebook: code_cells(notebook)[1].update(execution_count=None))
    seal(finished)
    assert only_problem(finished) == "cell 2 was not executed (no execution count); run again"


def test_error_output(finished):
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    edit(finished / "notebook.ipynb", lambda notebook: code_cells(notebook)[2]["outputs"].append(error))
    seal(finished)
    assert "shows an error, ValueError: no" in only_problem(finished)


def test_missing_sentinel(finished):
    edit(finished / "notebook.ipynb", lambda notebook: code_cells(notebook)[-1].update(outputs=[]))
    seal(finished)
    assert "shows 0 sentinels" in only_problem(finished)


def test_sentinel_that_is_not_in_the_last_cell(finished):
    def move(notebook):
        cells = code_cells(notebook)
        cells[1]["outputs"], cells[-1]["outputs"] = cells[-1]["outputs"], []

    edit(finished / "notebook.ipynb", move)
    seal(finished)
    assert "shows 0 sentinels" in only_problem(finished)


def test_sentinel_of_another_record(finished):
    """A record that is valid but not the one that the notebook wrote."""
    edit(finished / "record.json", lambda record: record["results"][0]["lds"].update(mean=0.49))
    assert "one was changed" in only_problem(finished)


def with_sentinel_for(folder):
    """Puts the record's present hash into the sentinel."""
    digest = hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()

    def change(notebook):
        output = code_cells(notebook)[-1]["outputs"][-1]
        text = "".join(output["data"]["text/plain"])
        output["data"]["text/plain"] = text.rsplit(" ", 1)[0] + " " + digest

    edit(folder / "notebook.ipynb", change)
    seal(folder)


def test_record_that_does_not_validate(finished):
    edit(finished / "record.json", lambda record: record["data"].update(kind="guessed"))
    with_sentinel_for(finished)
    assert "data.kind is 'guessed', expected one of official" in only_problem(finished)


def test_record_that_is_missing(finished):
    (finished / "record.json").unlink()
    assert "record.json cannot be read" in only_problem(finished)


def test_record_of_another_run(finished):
    edit(finished / "record.json", lambda record: record.update(run_id="other"))
    with_sentinel_for(finished)
    problems = verify_run(finished)
    assert any("sentinel names run" in problem for problem in problems)
    assert any("status.json is of run" in problem for problem in problems)


def test_notebook_changed_after_the_run(finished):
    edit(finished / "notebook.ipynb", lambda notebook: notebook["cells"][0].update(source="# Better"))
    assert "notebook.ipynb was changed after the run" in only_problem(finished)


@pytest.mark.parametrize("content", [None, "", "[]", '{"cells": [{}]}', '{"cells": []}'])
def test_damaged_notebook(finished, content):
    if content is None:
        (finished / "notebook.ipynb").unlink()
    else:
        (finished / "notebook.ipynb").write_text(content)
    assert any("notebook.ipynb" in problem or "sentinel" in problem for problem in verify_run(finished))


def test_what_to_do_is_said_once(finished):
    edit(finished / "notebook.ipynb", lambda notebook: code_cells(notebook)[1].update(execution_count=None))
    (finished / "record.json").write_text("{")
    problems = verify_run(finished)
    assert len(problems) > 1
    assert in_one_sentence(["a; run again", "b; run again"]) == "a; b; run again"
    assert in_one_sentence(["a; see b"]) == "a; see b"
    assert in_one_sentence(problems).count("; run again") == 1
    assert unfinished(finished) == ""
    for name in ("notebook.ipynb", "record.json"):
        (finished / name).unlink()
    edit(finished / "status.json", lambda status: status.update(exit_code=1, error="no mask"))
    assert only_problem(finished) == "exit code is 1, expected 0 (no mask); see log.txt and run again"
    assert unfinished(finished) == only_problem(finished)
    (finished / "status.json").unlink()
    assert only_problem(finished).startswith("no exit code")


def test_no_folder(tmp_path):
    assert verify_run(tmp_path / "nothing")[0].startswith("there is no run nothing")


def test_committed_run_keeps_three_files_and_verifies_under_another_name(finished, toy):
    home = toy.root / "book" / "measured" / "toy-embedded"
    home.mkdir(parents=True)
    for name in ("notebook.ipynb", "record.json", "status.json"):
        (home / name).write_bytes((finished / name).read_bytes())
    toy.write("changed = True")  # verifying is about integrity, not about today's source
    assert verify_run(home) == []
