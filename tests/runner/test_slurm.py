import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest

from grass_lib.errors import UsageError
from grass_lib.runner import plan, slurm


def fake_submitit(jobs):
    class AutoExecutor:
        def __init__(self, folder):
            self.folder = folder

        def update_parameters(self, **options):
            jobs.append(options)

        def batch(self):
            return nullcontext()

        def submit(self, function, *arguments):
            try:
                result, error = function(*arguments), None
            except RuntimeError as caught:
                result, error = None, caught
            return SimpleNamespace(job_id="7", result=lambda: result, exception=lambda: error)

    module = ModuleType("submitit")
    module.__spec__ = SimpleNamespace(name="submitit")
    module.AutoExecutor = AutoExecutor
    module.helpers = SimpleNamespace(DelayedSubmission=lambda *arguments: ("again", *arguments))
    return module


def test_missing_submitit_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install submitit, or use --executor local"):
        slurm.require_submitit()


def test_batch_goes_through_submitit(toy, finished, monkeypatch):
    options = []
    monkeypatch.setitem(sys.modules, "submitit", fake_submitit(options))
    planned = plan(["toy"])
    (outcome,) = slurm.run_on_slurm(planned, toy.runs, jobs=3)
    assert outcome.state == "skipped"
    assert options[0]["slurm_array_parallelism"] == 3
    task = slurm.RunTask()
    assert task.checkpoint(planned[0], False) == ("again", task, planned[0], False)


def test_lost_job_is_a_failure(toy, monkeypatch):
    def lost(planned, **more):
        raise RuntimeError("node failure")

    monkeypatch.setitem(sys.modules, "submitit", fake_submitit([]))
    monkeypatch.setattr(slurm, "execute_run", lost)
    (outcome,) = slurm.run_on_slurm(plan(["toy"]), toy.runs)
    assert (outcome.state, outcome.message) == ("failed", "job 7 failed: node failure")
