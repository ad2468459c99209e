import hashlib
import json
import shutil

import pytest

from grass_lib.errors import GrassError
from grass_lib.runner import find_run, run_folders, verified_records


def variant(folder, name, *, finished, changed=()):
    """A copy of a finished run under another name, whole again after the changes."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    record = json.loads((copy / "record.json").read_text()) | {"run_id": name, "finished": finished}
    (copy / "record.json").write_text(json.dumps(record))
    digest = hashlib.sha256((copy / "record.json").read_bytes()).hexdigest()
    notebook = json.loads((copy / "notebook.ipynb").read_text())
    notebook["cells"][-1]["outputs"][-1]["data"]["text/plain"] = f"grass-run-complete {name} {digest}"
    (copy / "notebook.ipynb").write_text(json.dumps(notebook))
    status = json.loads((copy / "status.json").read_text())
    digest = hashlib.sha256((copy / "notebook.ipynb").read_bytes()).hexdigest()
    status |= {"run_id": name, "changed": list(changed), "notebook_sha256": digest}
    (copy / "status.json").write_text(json.dumps(status))
    return copy


def test_unchanged_parameters_come_before_newer_tweaks_and_damage_is_left_out(finished, toy, caplog):
    variant(finished, "tweaked", finished="2099-01-03T00:00:00+00:00", changed=["seed"])
    variant(finished, "newer", finished="2099-01-01T00:00:00+00:00", changed=["device"])
    broken = variant(finished, "broken", finished="2099-01-04T00:00:00+00:00")
    (broken / "status.json").unlink()
    assert [record.run_id for record in verified_records()] == ["newer", finished.name, "tweaked"]
    assert "broken is left out: no exit code" in caplog.text
    assert verified_records(scale="paper") == []
    assert len(run_folders()) == 4


def test_run_is_found_by_name_and_path(finished, toy):
    assert find_run(finished.name) == finished
    assert find_run(str(finished)) == finished
    with pytest.raises(GrassError, match=f"there is no run 'x'; there are {finished.name}"):
        find_run("x")
