"""All systems on one workload: one after the other or at the same time, with checks on a model that is small enough."""

import sys
from contextlib import contextmanager

import pytest
import torch

from grass_lib.baselines import KronfluenceOptions, ModelShape, OursOptions, Workload, run_system
from grass_lib.baselines import comparison as module
from grass_lib.baselines.comparison import check_workload, compare
from grass_lib.errors import BaselineError

OURS = OursOptions(spec="normal-2*2->identity")


@pytest.fixture(autouse=True)
def own_python(monkeypatch):
    monkeypatch.setattr("grass_lib.baselines.process.baselines_python", lambda: sys.executable)


@pytest.mark.parametrize("at_once", [False, True])
def test_outcomes_and_phases(workload, tmp_path, at_once):
    phases = []

    @contextmanager
    def phase(name):
        phases.append(name)
        yield

    found = compare({"grass_lib": [OURS]}, workload, folder=tmp_path, at_once=at_once, phase=phase)
    alone = run_system("grass_lib", workload, [OURS])
    ((options, outcome),) = found.outcomes
    assert options == OURS
    assert torch.equal(outcome.scores, alone[0].scores)
    assert (found.checks, found.facts) == ([], [])
    assert list(found.versions) == ["grass_lib"]
    assert phases == ["all systems" if at_once else "grass_lib", "checks"]


def test_one_that_fails_is_told_and_what_the_others_found_is_kept(workload, tmp_path):
    plan = {"kronfluence": [KronfluenceOptions()], "grass_lib": [OURS]}
    with pytest.raises(BaselineError, match="kronfluence"):
        compare(plan, workload, folder=tmp_path, at_once=True)
    assert (tmp_path / "grass_lib" / "outcome-0.json").is_file()


def test_a_large_model_is_checked_by_a_small_one(workload):
    assert check_workload(workload) is workload
    ids = torch.randint(0, 50257, (60, 512))
    large = Workload(ModelShape("gpt2", {}), ids, ids[:50], {"a": torch.zeros(1)}, batch_size=8)
    small = check_workload(large)
    assert small.shape.sizes["width"] == 64
    assert small.shape.sizes["vocabulary"] == 50257
    assert (small.train_ids.shape, small.query_ids.shape, small.weights) == ((48, 128), (48, 128), None)
    assert small.batch_size == 8


def test_checks_of_a_large_model_run_apart(workload, tmp_path, monkeypatch):
    asked = []

    def run(system, work, options, *, folder, timeout, facts=False):
        asked.append((work is workload, len(options), folder.name, facts))
        return run_system("grass_lib", workload, [OURS] * len(options), folder=folder, facts=facts)

    monkeypatch.setattr(module, "run_system", run)
    monkeypatch.setattr(module, "judge", lambda work, check, outcome: {"same": work is not workload})
    monkeypatch.setattr(module, "check_workload", lambda work: work.first(4))
    found = compare({"bergson": [OURS]}, workload, folder=tmp_path)
    assert asked == [(False, 2, "checks", True), (True, 1, "bergson", False)]
    assert found.checks == [{"same": True}] * 2
    assert len(found.outcomes) == 1
