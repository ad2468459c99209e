"""Everything against a real Slurm of one machine, which the tests start and end themselves."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cluster_toys
import pytest
from slurm_here import SlurmHere, missing

from grass_lib.cluster.settings import load_settings
from grass_lib.cluster.submit import check_resources
from grass_lib.errors import UsageError

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(missing()), reason=f"Slurm and munge are not installed: no {', '.join(missing())}"),
]
SETTINGS = 'partition = "low"\ntime = "0:30:00"\ncpus = 1\nmemory = "600M"\n[paper]\ngpus = 0\n'
STORE = ["--sparsification", "random_mask-3*3", "--projection", "sjlt-4", "--dtype", "float32", "--shard-size", "4"]


@pytest.fixture(scope="module")
def slurm():
    # A short path: the name of munge's socket may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, SlurmHere(Path(folder)) as here:
        yield here


class Project:
    """A toy project whose commands go to the cluster."""

    def __init__(self, root: Path, slurm: SlurmHere) -> None:
        self.root = cluster_toys.make(root)
        self.runs, self.hold, self.slurm = root / "runs", root / "hold", slurm
        (root / "slurm.toml").write_text(SETTINGS)
        self.environment = {**os.environ, **slurm.environment, **cluster_toys.environment(root)}

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "grass_lib", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.root,
        )

    def grass(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        out, errors = process.communicate(timeout=100)
        assert process.returncode == code, out + errors
        return out + errors

    def jobs(self) -> dict[str, dict]:
        return {job["name"]: job for job in json.loads(self.grass("jobs", "list", "--json"))}


def until(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
    return found


@pytest.fixture
def project(tmp_path, slurm):
    made = Project(tmp_path / "project", slurm)
    yield made
    made.hold.unlink(missing_ok=True)
    slurm.call("scancel", f"--user={os.getuid()}", check=False)


def made_by(folder: Path) -> dict[str, str]:
    """What a run leaves, without what tells attempts and times apart."""
    record = json.loads((folder / "record.json").read_text())
    kept = {path.name: path.read_text() for path in folder.glob("store/step*")}
    return kept | {name: json.dumps(record[name]) for name in ("parameters", "results", "data")}


def test_array_runs_is_collected_like_local_runs_and_a_failing_notebook_is_named(project):
    project.hold.touch()
    failing = project.start("run", "first", "-p", "act=raise", "-p", "seed=7", "--executor", "slurm")
    until(lambda: list(project.runs.glob("*/store/waiting")))
    bad = next(iter(project.jobs().values()))
    words = ["run", "first", "second", "--scale", "paper", "--executor", "slurm"]
    shown = project.grass(*words, "--no-wait")
    assert "on this machine there is no GPU here; its job looks again" in shown
    jobs = {name: job for name, job in project.jobs().items() if name != bad["name"]}
    assert len({job["job"].partition("_")[0] for job in jobs.values()}) == 1, "one array"
    assert sorted(job["job"].partition("_")[2] for job in jobs.values()) == ["0", "1"]
    until(lambda: len(list(project.runs.glob("*/store/waiting"))) == 3)
    follow = project.start("jobs", "logs", "--follow", next(iter(jobs)))
    impatient = project.start(*words)
    "".join(iter(impatient.stderr.readline, "jobs: 2 running\n"))
    impatient.send_signal(signal.SIGINT)
    _, errors = impatient.communicate(timeout=30)
    assert impatient.returncode == 130
    assert "the jobs go on" in errors
    waiting = project.start(*words)
    before = "".join(iter(waiting.stderr.readline, "jobs: 2 running\n"))
    assert before.count("in queue") == 2, "nothing is submitted twice"
    project.hold.unlink()
    out, errors = waiting.communicate(timeout=90)
    assert waiting.returncode == 0, out + errors
    assert sum(line.startswith("done ") for line in errors.splitlines()) == 2
    assert {project.jobs()[name]["state"] for name in jobs} == {"done"}
    assert project.grass(*words).count("skipped") == 2
    out, _ = follow.communicate(timeout=30)
    assert follow.returncode == 0
    assert "Job completed successfully" in out
    assert "array" not in project.grass(*words, "--dry-run")
    assert "Job completed successfully" in project.grass("jobs", "logs", next(iter(jobs)))
    shown = project.grass("verify")
    assert sum(line.startswith("ok ") for line in shown.splitlines()) == 2
    assert "open " in shown  # the one that fails does not count

    out, errors = failing.communicate(timeout=60)
    assert failing.returncode == 1, out + errors
    assert "raised ValueError: seed 7 is unlucky" in errors
    assert bad["log"] in " ".join(errors.split())
    (job,) = (job for name, job in project.jobs().items() if name == bad["name"])
    assert (job["state"], job["slurm"]["state"]) == ("failed", "FAILED")
    assert "ValueError" in project.grass("jobs", "logs", job["job"])
    project.grass("jobs", "wait", job["job"], code=1)


def test_jobs_that_were_ended_in_the_middle_go_on_and_give_the_same(project, slurm, tmp_path):
    project.hold.touch()
    undisturbed = Project(tmp_path / "undisturbed", slurm)
    local = undisturbed.start("run", "first", "-q", "-p", "seed=1")
    names: list[str] = []
    for seed in range(3):
        # For submitit every signal to a job of ten minutes or less means that its time limit is near.
        limit = ["--slurm", "time=0:10:00"] if seed == 1 else []
        project.grass("run", "first", "-p", f"seed={seed}", "--executor", "slurm", "--no-wait", *limit)
        names += project.jobs().keys() - set(names)
    by_user = project.start("run", "second", "--executor", "slurm")
    until(lambda: len(list(project.runs.glob("*/store/waiting"))) == 4)
    jobs = project.jobs()
    names += jobs.keys() - set(names)
    assert {job["state"] for job in jobs.values()} == {"running"}

    slurm.call("scontrol", "requeue", jobs[names[0]]["job"])
    slurm.call("scancel", "--signal=USR2", jobs[names[1]]["job"])
    assert f"cancelled {jobs[names[3]]['job']}" in project.grass("jobs", "cancel", names[3])
    until(lambda: [project.jobs()[name]["state"] for name in names].count("running") == 1)
    slurm.call("sbatch", "--partition=high", "--cpus-per-task=4", "--mem=3G", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: project.jobs()[names[2]]["state"] != "running")
    out, errors = by_user.communicate(timeout=60)
    assert by_user.returncode == 1, out + errors
    assert "Slurm says CANCELLED" in errors
    assert project.jobs()[names[3]]["state"] == "cancelled"
    assert "nothing to cancel" in project.grass("jobs", "cancel", names[3])

    project.hold.unlink()
    project.grass("run", "second", "--executor", "slurm", "--no-wait")
    shown = project.grass("jobs", "wait")
    assert all(project.jobs()[name]["state"] == "done" for name in names), shown
    assert "(9 remaining timeouts)" in Path(jobs[names[1]]["log"]).read_text()
    assert local.wait(60) == 0
    for name in names:
        assert (project.runs / name / "store" / "attempts").read_text() == "xx", f"{name} was not run twice"
    again = project.runs / names[1]
    assert made_by(again) == made_by(undisturbed.runs / again.name)
    assert sum(line.startswith("ok ") for line in project.grass("verify").splitlines()) == 4


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_three_workers_one_of_them_requeued_fill_the_store_that_one_fills(project, slurm):
    project.hold.touch()
    words = ["store", "cache", "stored", *STORE]
    shown = project.grass(*words, "--store", "three", "--executor", "slurm", "--workers", "3", "--no-wait")
    assert shown.count("submitted") == 4, "three workers and the check"
    assert "already fill" in project.grass(*words, "--store", "three", "--executor", "slurm", code=1)
    until(lambda: len(list(project.root.glob("stored-*"))) == 3)
    array = project.jobs()["three 1/3"]["job"]
    slurm.call("scancel", "--signal=USR2", array)
    until(lambda: project.jobs()["three 1/3"]["state"] != "running")
    project.hold.unlink()
    local = project.start(*words, "--store", "one", "-q")
    waited = project.grass("jobs", "wait")
    states = {name: job["state"] for name, job in project.jobs().items()}  # a worker may be done before the wait begins
    assert states == dict.fromkeys(("three 0/3", "three 1/3", "three 2/3", "three check"), "done"), waited
    assert local.wait(60) == 0
    assert content(project.root / "three") == content(project.root / "one")
    assert "all 6 shards are as they were written" in project.grass("jobs", "logs", "three check")


def test_what_slurm_would_not_take_is_refused_before_anything_is_submitted(project, slurm, monkeypatch):
    shown = " ".join(
        project.grass("run", "first", "--executor", "slurm", "--slurm", "partition=nowhere", code=2).split()
    )
    assert "invalid partition specified: nowhere" in shown
    assert project.jobs() == {}
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    settings = {
        "time=2:00:00": "time limit is 60 minutes, and 120 are",
        "gpus=1": "generic resource",
        "memory=900G": "emory",
    }
    for typed, message in settings.items():
        resources = load_settings(project.root, [typed, *(["gpus=0"] if typed != "gpus=1" else [])]).resources(
            "x", "paper"
        )
        with pytest.raises(UsageError, match=message):
            check_resources(resources, "x")
