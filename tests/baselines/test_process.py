"""The process around a system: what is handed over, and what happens when it fails."""

import json
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

from grass_lib.baselines import (
    BergsonOptions,
    DattriOptions,
    KronfluenceOptions,
    LogIXOptions,
    ModelShape,
    OursOptions,
    Outcome,
    Workload,
    baselines_python,
    missing_baselines,
    run_system,
)
from grass_lib.baselines.exchange import read_job, read_outcome, write_job, write_outcome
from grass_lib.baselines.measure import Phases
from grass_lib.baselines.plan import comparison, damping_values
from grass_lib.baselines.systems import SYSTEMS, check_systems
from grass_lib.errors import BaselineError, UsageError


def script(path, body):
    """A stand-in for a Python that runs the worker: its arguments are ``-m grass_lib.baselines.worker FOLDER``."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_job_comes_back_as_it_was(workload, tmp_path):
    options = [LogIXOptions(rank=4, dampings=(0.1, 0.01)), LogIXOptions(init="pca", hessian="ekfac", few=5)]
    digest = write_job(tmp_path, "logix", workload, options, facts=True)
    system, found, again, facts = read_job(tmp_path)
    assert (system, facts, again) == ("logix", True, options)
    assert torch.equal(found.train_ids, workload.train_ids)
    assert found.shape == workload.shape
    assert found.weights is None
    assert write_job(tmp_path, "logix", workload, options, facts=True) == digest
    assert write_job(tmp_path, "logix", workload.first(3), options, facts=True) != digest


def test_an_outcome_comes_back_as_it_was(tmp_path):
    scores = torch.randn(2, 3, 4)
    outcome = Outcome(
        "logix", "LogIX", scores, (None, 0.1), {"gradients": 2.0, "curvature": 2.0}, {"gradients": 5}, 7, "0.1.1",
        tensors={"a/input": torch.ones(2, 2)}, details={"layers": 3},
    )  # fmt: skip
    write_outcome(tmp_path, 0, outcome)
    found = read_outcome(tmp_path, 0)
    assert torch.equal(found.scores, scores)
    assert (found.dampings, found.stored_bytes, found.details) == ((None, 0.1), 7, {"layers": 3})
    assert list(found.tensors) == ["a/input"]
    assert found.tokens_per_second(8, curvature=True) == 2.0
    assert found.tokens_per_second(8, curvature=False) == 4.0
    with pytest.raises(BaselineError, match="answer 1"):
        read_outcome(tmp_path, 1)


def test_a_failing_worker_gives_its_log(workload, tmp_path):
    python = script(tmp_path / "python", "echo something went wrong; exit 3")
    with pytest.raises(BaselineError, match=r"LogIX ended with exit code 3(.|\n)*something went wrong"):
        run_system("logix", workload, [LogIXOptions()], python=python)


def test_a_killed_worker_says_so(workload, tmp_path):
    python = script(tmp_path / "python", "echo working; kill -9 $$")
    with pytest.raises(BaselineError, match=r"SIGKILL(.|\n)*working"):
        run_system("logix", workload, [LogIXOptions()], python=python)


def test_a_worker_that_hangs_is_stopped_with_its_children(workload, tmp_path):
    python = script(tmp_path / "python", f"sleep 600 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(BaselineError, match="took longer than 1 s"):
        run_system("logix", workload, [LogIXOptions()], python=python, timeout=1.0)
    status = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")

    def gone():
        try:
            return status.read_text().split()[2] in "ZX"
        except OSError:
            return True

    end = time.monotonic() + 10  # a signal takes a moment on a busy machine
    while not gone() and time.monotonic() < end:
        time.sleep(0.05)
    assert gone()


def test_answers_of_the_same_work_are_used_again(workload, tmp_path):
    home = tmp_path / "home"
    first = run_system(
        "grass_lib", workload, [OursOptions(spec="normal-4*4->identity")], python=sys.executable, folder=home
    )
    broken = script(tmp_path / "python", "exit 1")
    again = run_system("grass_lib", workload, [OursOptions(spec="normal-4*4->identity")], python=broken, folder=home)
    assert torch.equal(first[0].scores, again[0].scores)
    with pytest.raises(BaselineError, match="exit code 1"):
        run_system("grass_lib", workload, [OursOptions(spec="normal-2*2->identity")], python=broken, folder=home)


def test_a_killed_job_goes_on_with_the_options_that_it_lacks(workload, tmp_path):
    home, options = tmp_path / "home", [OursOptions(spec=f"normal-{k}*{k}->identity") for k in (2, 4)]
    first = run_system("grass_lib", workload, options, python=sys.executable, folder=home)
    note = home / "outcome-0.json"
    kept = note.read_text().replace('"stored_bytes": ', '"stored_bytes": 1')
    note.write_text(kept)
    (home / "outcome-1.json").unlink()
    again = run_system("grass_lib", workload, options, python=sys.executable, folder=home)
    assert note.read_text() == kept
    assert again[0].stored_bytes == int(f"1{first[0].stored_bytes}")
    assert torch.equal(again[1].scores, first[1].scores)


def test_a_damping_grid_as_it_is_typed():
    assert damping_values("", (1.0, 2.0)) == (1.0, 2.0)
    assert damping_values("1, 0.1,1", (3.0,)) == (0.1, 1.0)
    for text in ("a", "0.1,,1", "nan", "-1"):
        with pytest.raises(UsageError, match="expected numbers above 0"):
            damping_values(text, (1.0,))


def test_without_the_venv_the_error_says_what_to_do(monkeypatch, tmp_path, workload):
    monkeypatch.setenv("GRASS_BASELINES", str(tmp_path / "nowhere"))
    assert "make baselines" in missing_baselines()
    for call in (baselines_python, lambda: run_system("logix", workload, [LogIXOptions()])):
        with pytest.raises(UsageError, match="make baselines"):
            call()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LogIXOptions(init="pcs"), "random, pca"),
        (lambda: LogIXOptions(dampings=(0.0,)), "above 0"),
        (lambda: DattriOptions(method="lora"), "logra, factgrass, trak"),
        (lambda: BergsonOptions(side=-1), "side is -1"),
        (lambda: KronfluenceOptions(strategy="gauss"), "ekfac, kfac"),
        (lambda: OursOptions(spec="nonsense-3"), "nonsense"),
        (lambda: ModelShape("bert", {}), "gpt2, llama"),
        (lambda: ModelShape("gpt2", {}, "int8"), "float32, bfloat16"),
        (
            lambda: Workload(ModelShape("gpt2", {}), torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 4)),
            "query_ids",
        ),
        (lambda: check_systems("logix,trak"), "'trak'"),
        (lambda: comparison([10], [0.1]), "squares"),
    ],
)
def test_wrong_options_are_named(build, message):
    with pytest.raises(UsageError, match=message):
        build()


def test_a_system_takes_its_own_options_only(workload):
    with pytest.raises(UsageError, match="its own options"):
        run_system("logix", workload, [BergsonOptions()], python=sys.executable)
    with pytest.raises(UsageError, match="expected one of grass_lib"):
        run_system("trak", workload, [])


def test_every_system_gets_the_same_sizes_and_grid():
    plan = comparison([16, 64], [0.1, 0.01])
    assert list(plan) == list(SYSTEMS)
    assert {options.rank for options in plan["logix"]} == {4, 8}
    assert {(options.init, options.hessian) for options in plan["logix"]} == {
        ("random", "raw"), ("pca", "raw"), ("random", "ekfac"), ("pca", "ekfac"), ("random", "none"),
    }  # fmt: skip
    every = comparison([16, 64], [0.1, 0.01], all_modes=True)["logix"]
    assert {(options.init, options.rank, options.hessian) for options in every} == {
        (init, rank, hessian) for init in ("random", "pca") for rank in (4, 8) for hessian in ("raw", "ekfac", "none")
    }
    assert len(every) == 12
    for name in ("grass_lib", "dattri", "bergson"):
        assert {options.dampings for options in plan[name]} == {(0.1, 0.01)}
    assert {options.k for options in plan["dattri"]} == {64}
    assert [options.side for options in plan["bergson"]] == [8]
    assert json.dumps([options.to_json() for items in plan.values() for options in items])


def test_clocks_without_memory_leave_the_peak_of_the_phase_around_them(monkeypatch):
    resets = []
    monkeypatch.setattr(Phases, "_reset_peak", lambda self: resets.append(self))
    outer, inner = Phases("cpu"), Phases("cpu", memory=False)
    with outer("walk"), inner("part"):
        pass
    assert resets == [outer]
    assert inner.seconds["part"] >= 0
    assert inner.peak_bytes == {}
