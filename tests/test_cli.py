import json
import os
import subprocess
import sys

import pytest
import toy_project

from grass_lib import cli, doctor
from grass_lib.project import missing_runs, project_root, runs_root
from grass_lib.report.claims import THROUGHPUT
from grass_lib.report.ledger import METRICS


@pytest.fixture
def toy(tmp_path, monkeypatch):
    project = toy_project.make(tmp_path / "project")
    monkeypatch.setenv("GRASS_ROOT", str(project.root))
    monkeypatch.setenv("GRASS_RUNS", str(project.runs))
    monkeypatch.delenv("GRASS_DATA", raising=False)
    monkeypatch.setattr("grass_lib.experiments.EXPERIMENTS", project.registry(), raising=False)
    monkeypatch.chdir(project.root)
    return project


@pytest.fixture
def grass(capsys):
    def call(*words):
        code = cli.main(words)
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nosuch"], "experiment 'nosuch' is not known, expected toy"),
        (["run", "toi"], "did you mean 'toy'"),
        (["run", "--scale", "huge"], "scale is 'huge', expected 'embedded'"),
        (["run", "-p", "seed"], "expected name=value"),
        (["run", "-p", "sede=1"], "did you mean 'seed'"),
        (["run", "-p", "seed=1.5"], "parameter 'seed' is '1.5', expected a whole number (int)"),
        (["run", "-p", "seed=-1"], "parameter 'seed' is -1; expected a whole number from 0"),
        (["run", "-p", "ks=1,b"], "expected a list such as 1,2"),
        (["run", "-p", "scale=paper"], "give it as --scale"),
        (["run", "-p", "run_id=x"], "the runner makes it"),
        (["run", "-p", "act=../../x"], "no path that leaves the run's folder"),
        (["run", "-p", "specs=sjtl-256"], "sjlt"),
        (["run", "-p", "specs=sjlt-256,,sjlt-512"], "empty entry"),
        (["run", "--projection", "SJLT-256"], "sjlt-256"),
        (["run", "--sparsification", "random_mask"], "random_mask"),
        (["run", "--projection", "sjlt-2", "--projection", "sjlt-3", "--sparsification", "identity"], "expected pairs"),
        (["run", "--projection", "sjlt-2", "-p", "specs=sjlt-2"], "both by --sparsification/--projection and by -p"),
        (["run", "--hessian", "efim"], "eFIM"),
        (["run", "--hessian", "eFIM"], "toy has no parameter 'hessian'"),
        (["run", "--seed", "-3"], "--seed is -3"),
        (["run", "--seed", "x"], "Invalid value for '--seed'"),
        (["run", "--seed", "1", "-p", "seed=2"], "both by --seed and by -p"),
        (["run", "--jobs", "0"], "--jobs is 0"),
        (["run", "--executor", "cloud"], "--executor is 'cloud'"),
        (["run", "--nosuch"], "No such option"),
        (["nosuch"], "No such command"),
        (["ledger", "--experiment", "x"], "--experiment is 'x', expected one of mlp_mnist"),
        (["ledger", "--metric", "x"], "--metric is 'x'"),
        (["doctor", "--scale", "x"], "scale is 'x'"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2_before_anything_runs(toy, grass, words, message):
    code, out, errors = grass(*words)
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert message in errors
    assert "Traceback" not in errors
    assert not toy.runs.exists()


def test_parameters_are_listed_with_the_error(toy, grass):
    _, _, errors = grass("run", "-p", "sede=1")
    assert "Parameters of toy:\n  act: str = 'good'" in errors
    assert "ks: list[int] = [256, 512]" in errors


def test_unusable_project_and_runs_folder(toy, grass, monkeypatch, tmp_path):
    toy.template.unlink()
    code, _, errors = grass("run")
    assert (code, "notebooks/toy.ipynb is missing" in errors) == (1, True)
    monkeypatch.setenv("GRASS_ROOT", str(tmp_path / "none"))
    code, _, errors = grass("run")
    assert (code, "has no folder notebooks/" in errors) == (2, True)
    monkeypatch.setenv("GRASS_ROOT", str(toy.root))
    toy.write()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path / "file"))
    code, _, errors = grass("run")
    assert (code, "is not a folder" in errors) == (2, True)
    monkeypatch.setenv("GRASS_RUNS", "/proc/nothing")
    for words in (["run"], ["run", "--dry-run"]):
        code, _, errors = grass(*words)
        assert (code, "set GRASS_RUNS to one that can" in errors) == (2, True)


def test_a_mistyped_runs_folder_is_named(toy, grass, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path / "none" / "runs"))
    said = f"GRASS_RUNS is '{tmp_path / 'none' / 'runs'}', which does not exist"
    code, out, _ = grass("verify")
    assert (code, said in out) == (0, True)
    monkeypatch.setattr("grass_lib.report.book.build", lambda root, strict: root)
    code, _, _ = grass("book")
    assert code == 0
    assert said in caplog.text
    toy.runs.mkdir()
    monkeypatch.setenv("GRASS_RUNS", str(toy.runs))
    assert missing_runs() == ""


def test_scale_that_does_not_work_here(toy, grass):
    toy.problems = {"paper": ["there is no GPU here"]}
    code, out, errors = grass("run", "--scale", "paper")
    assert (code, out) == (2, "")
    assert "there is no GPU here" in errors
    assert "grass run toy --scale embedded" in errors


def test_run_skip_fail_and_verify(toy, grass):
    code, out, errors = grass("run", "-q")  # no experiment: all of them
    assert (code, out) == (0, "")
    assert "done      toy-embedded-" in errors
    code, _, errors = grass("run", "toy", "-q")
    assert code == 0
    assert "an identical run is finished (runs/toy-embedded-" in errors

    code, _, errors = grass("run", "toy", "-p", "act=raise", "-q")
    assert code == 1
    assert "failed    toy-embedded-" in errors
    assert "seed 0 is unlucky (log: runs/toy-embedded-" in errors
    assert "error: 1 of 1 runs failed" in errors

    code, out, _ = grass("verify")
    assert code == 0, "a failed run was never finished"
    assert sum(line.startswith("ok ") for line in out.splitlines()) == 1
    failed = next(line for line in out.splitlines() if line.startswith("open"))
    assert "does not count, exit code is 1, expected 0 (code cell 4 raised" in failed
    assert failed.count("run again") == 1
    code, out, errors = grass("verify", failed.split()[1].rstrip(":"))
    assert (code, out.count("BAD"), out.count("run again")) == (1, 1, 1)
    assert "error: 1 of 1 runs do not verify" in errors
    _, out, _ = grass("verify")
    good = next(line.split()[1] for line in out.splitlines() if line.startswith("ok"))
    assert grass("verify", good)[0] == 0
    assert grass("verify", good.removeprefix("runs/"))[0] == 0
    (toy.runs.parent / good / "record.json").unlink()
    code, out, errors = grass("verify")
    assert (code, out.count("BAD")) == (1, 1)
    assert "error: 1 of 1 runs do not verify" in errors
    code, _, errors = grass("verify", "nosuch")
    assert code == 2
    assert "there is no run 'nosuch'; there are toy-embedded-" in errors


def test_shortcuts_become_parameters(toy, grass):
    words = ["--seed", "3", "--sparsification", "random_mask-1024", "--projection", "sjlt-256", "--dry-run"]
    code, out, _ = grass("run", *words)
    assert code == 0
    assert "run (new)" in out
    assert "seed=3, specs='random_mask-1024->sjlt-256'" in out
    assert not toy.runs.exists()
    _, out, _ = grass("run", "--projection", "sjlt-256", "--projection", "normal-8", "--dry-run")
    assert "specs='sjlt-256,normal-8'" in out


def test_list_parameters(toy, grass):
    code, out, _ = grass("run", "--list-parameters")
    assert code == 0
    assert "rate: float = 0.5" in out


def test_runs_by_hand_are_mentioned_and_do_not_count(toy, grass):
    from grass_lib.report.record import Run

    run = Run.begin(experiment="toy", scale="paper", parameters={}, run_id="")
    run.describe_data(source="x", rows=1, sha256="0" * 64, kind="official")
    run.finish()
    code, out, _ = grass("verify")
    assert code == 0
    assert "made by hand, does not count" in out
    assert grass("verify", run.run_id)[0] == 1


def test_ledger_json_and_table(toy, grass, monkeypatch):
    code, out, _ = grass("ledger", "--json")
    assert code == 0
    rows = json.loads(out)
    assert len(rows) == 223
    code, out, _ = grass("ledger")
    assert code == 0
    assert "mlp_mnist: LDS" in out
    assert "random_mask-128*128 -> sjlt-4096" in out
    assert "LDS rows: 111 not run" in out
    _, out, _ = grass("ledger", "--json", "--experiment", "mlp_mnist", "--metric", "lds")
    assert len(json.loads(out)) == 15
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = grass("ledger", "--help")
    for metric in (*METRICS, THROUGHPUT):
        assert metric in out
        assert grass("ledger", "--json", "--metric", metric)[0] == 0


def test_doctor_says_what_works_and_what_to_do(toy, grass, monkeypatch):
    toy.problems = {"paper": ["there is no GPU here; use a machine with one"]}
    code, out, _ = grass("doctor")
    assert code == 0
    assert "yes: grass run toy --scale embedded" in out
    assert "no: there is no GPU here; use a machine with one" in out
    assert grass("doctor", "--strict")[0] == 1
    assert grass("doctor", "--strict", "--scale", "embedded")[0] == 0
    monkeypatch.setenv("GRASS_DATA", str(toy.root / "none"))
    code, out, _ = grass("doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert [item["works"] for item in report["experiments"]] == [True, False]
    data = next(fact for fact in report["machine"] if fact["name"] == "GRASS_DATA")
    assert data["good"] is False
    toy.template.write_text("{")
    assert "not a readable notebook" in grass("doctor")[1]


def test_doctor_asks_slurm_whether_it_answers(toy, monkeypatch, tmp_path):
    for name in ("sbatch", "squeue", "scancel", "srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\n. " + str(tmp_path / "answer") + "\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "SLURM_SECONDS", 0.5)
    for answer, good, said in (
        ("echo main", True, "jobs can be submitted"),
        ("echo no controller >&2; exit 1", False, "sinfo failed: no controller"),
        ("exec sleep 20", False, "timed out"),
    ):
        (tmp_path / "answer").write_text(answer)
        fact = next(fact for fact in doctor.machine_facts() if fact.name == "Slurm")
        assert (fact.good, said in fact.value) == (good, True), fact


def test_help_names_every_command_and_the_exit_codes(grass):
    code, out, _ = grass("--help")
    assert code == 0
    for word in ("doctor", "run", "verify", "book", "ledger", "Exit codes"):
        assert word in out
    assert grass()[0] == 2
    for command in ("doctor", "run", "verify", "book", "ledger"):
        code, out, _ = grass(command, "--help")
        assert code == 0
        assert f"grass {command}" in out


def test_module_runs_from_a_checkout_anywhere(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(toy_project.REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "grass_lib", "run", "nosuch"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "experiment 'nosuch' is not known" in done.stderr


def test_project_is_found_from_below_and_by_name(toy, monkeypatch, tmp_path):
    monkeypatch.delenv("GRASS_RUNS")
    monkeypatch.setenv("GRASS_ROOT", str(toy.root))
    monkeypatch.chdir(tmp_path)
    assert project_root() == toy.root
    monkeypatch.delenv("GRASS_ROOT")
    (toy.root / "notebooks" / "deep").mkdir()
    monkeypatch.chdir(toy.root / "notebooks" / "deep")
    assert (project_root(), runs_root()) == (toy.root, toy.root / "runs")
    monkeypatch.chdir("/")
    assert project_root() == toy_project.REPOSITORY


@pytest.mark.parametrize("group", ["store", "bench", "jobs"])
def test_a_group_without_a_command_shows_its_help(group, capsys):
    assert cli.main([group]) == 2
    said = capsys.readouterr()
    assert " ".join((said.out + said.err).split()).count(f"Usage: grass {group}") == 1
    assert "error:" not in said.err


def test_a_wrong_option_points_to_the_help_of_its_command(capsys):
    assert cli.main(["store", "info", "x", "--nothing"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--nothing" in said
    assert said.endswith("See `grass store info --help`.")


def test_results_of_benchmarks_go_below_the_folder_of_runs(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path))
    monkeypatch.setattr("grass_lib.bench.throughput_run.run", lambda model, **named: seen.append(named) or {})
    monkeypatch.setattr("grass_lib.bench.throughput_run.summary", lambda result: "")
    assert cli.main(["bench", "throughput", "--model", "tiny"]) == 0
    assert seen[0]["out"] == tmp_path / "bench" / "throughput.json"
    assert seen[0]["folder"] == tmp_path / "bench" / "throughput"
    assert cli.main(["bench", "throughput", "--model", "tiny", "--json", str(tmp_path)]) == 2
    assert "a folder; expected the name of a file" in " ".join(capsys.readouterr().err.split())
    assert len(seen) == 1
