import shutil

import pytest
import toy_project


def activate(toy, monkeypatch):
    import grass_lib.experiments

    monkeypatch.setenv("GRASS_ROOT", str(toy.root))
    monkeypatch.setenv("GRASS_RUNS", str(toy.runs))
    monkeypatch.setattr(grass_lib.experiments, "EXPERIMENTS", toy.registry(), raising=False)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An empty toy project."""
    project = toy_project.make(tmp_path / "project")
    activate(project, monkeypatch)
    return project


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """A toy project with one finished run, made once for the session; copy it, do not change it."""
    from grass_lib.runner import plan, run_all

    project = toy_project.make(tmp_path_factory.mktemp("executed") / "project")
    with pytest.MonkeyPatch.context() as patch:
        activate(project, patch)
        (outcome,) = run_all(plan(["toy"]), progress=False)
    assert (outcome.state, outcome.message) == ("done", "")
    return outcome.planned.folder


@pytest.fixture
def finished(toy, executed):
    """A folder with a finished run in an own toy project."""
    folder = toy.runs / executed.name
    shutil.copytree(executed, folder)
    return folder
