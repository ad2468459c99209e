"""What is made of what Slurm says, without one."""

import json
import sys
from pathlib import Path

import pytest

from grass_lib.cluster import queue, records, submit, watch
from grass_lib.cluster.queue import QueueEntry
from grass_lib.cluster.records import JobRecord
from grass_lib.cluster.watch import judge
from grass_lib.errors import GrassError, UsageError

NOW = "2026-01-02T03:04:05+00:00"


def job(folder, job_id="7_0", kind="cache"):
    return JobRecord(job_id, kind, "name", str(folder / "target"), ("verify",), str(folder / f"{job_id}.out"), NOW)


def stamp(folder, code, job_id="7_0"):
    (folder / f"{job_id}.exit").write_text(f"{code}\n")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_what_is_in_the_queue_has_not_ended_whatever_an_earlier_attempt_said(tmp_path, state):
    stamp(tmp_path, 1)
    found = judge(job(tmp_path), QueueEntry(state))
    assert (found.state, found.active, found.settled) == (state.lower(), True, False)


@pytest.mark.parametrize(
    ("code", "state", "expected", "settled"),
    [
        (0, "COMPLETED", "done", True),
        (0, None, "done", True),
        (2, "FAILED", "failed", True),
        (1, None, "failed", True),
        (None, "CANCELLED", "cancelled", True),
        (None, "TIMEOUT", "timeout", True),
        (None, "FAILED", "failed", True),
        (None, "COMPLETED", "ended", False),
        (None, "NODE_FAIL", "node_fail", False),
        (None, "PREEMPTED", "preempted", False),
        (None, None, "ended", False),
    ],
)
def test_how_a_job_ended(tmp_path, code, state, expected, settled):
    if code is not None:
        stamp(tmp_path, code)
    (tmp_path / "7_0.out").write_text("error: it broke\nsubmitit INFO bye\n")
    found = judge(job(tmp_path), QueueEntry(state) if state else None)
    assert (found.state, found.settled, found.active) == (expected, settled, False)
    assert found.good == (expected == "done")
    assert bool(found.message) != found.good
    if code:
        assert f"exit code {code}: error: it broke" in found.message


def test_run_that_ended_well_has_to_verify(tmp_path):
    (tmp_path / "target").mkdir()
    status = {
        "run_id": "r", "experiment": "e", "scale": "embedded", "exit_code": 0, "started": NOW, "ended": NOW,
        "parameters": {}, "changed": [], "data_fingerprint": None, "template_sha256": "", "modules": {},
        "notebook_sha256": None, "error": None, "schema_version": 1,
    }  # fmt: skip
    (tmp_path / "target" / "status.json").write_text(json.dumps(status))
    stamp(tmp_path, 0)
    found = judge(job(tmp_path, kind="run"), QueueEntry("COMPLETED"))
    assert found.state == "failed"
    assert "notebook.ipynb is missing" in found.message


def test_watch_waits_through_requeues_and_silence(tmp_path, monkeypatch):
    jobs = [job(tmp_path, "7_0"), job(tmp_path, "7_1")]
    for item in jobs:
        stamp(tmp_path, 0, item.id)
    answers = [
        {"7_0": QueueEntry("RUNNING"), "7_1": QueueEntry("PENDING", reason="BeginTime")},
        GrassError("squeue failed"),
        {"7_0": QueueEntry("PENDING"), "7_1": QueueEntry("COMPLETED")},
        {"7_0": QueueEntry("COMPLETED")},
    ]

    def look(ids):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(watch, "look", look)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    seen, said = [], []
    ended = watch.watch(jobs, report=lambda state: seen.append(state.job.id), say=said.append)
    assert [state.state for state in ended] == ["done", "done"]
    assert seen == ["7_1", "7_0"]
    assert said[0] == "1 pending (BeginTime), 1 running"
    assert not answers


def test_watch_gives_up_when_slurm_stays_silent(tmp_path, monkeypatch):
    def look(ids):
        raise GrassError("squeue failed")

    monkeypatch.setattr(watch, "look", look)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    with pytest.raises(GrassError, match="squeue failed; the jobs go on"):
        watch.watch([job(tmp_path)])


def fake(folder, name, text, code=0):
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\nprint({text!r})\nsys.exit({code})\n")
    path.chmod(0o755)


def test_queue_and_accounting_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(tmp_path, "squeue", "7_0|RUNNING|1:02|node3|None\n7_1|PENDING|0:00||Resources\n9|RUNNING|0:01|x|None")
    fake(tmp_path, "sacct", "6|CANCELLED by 1000|0:10|node1\n5|COMPLETED|0:11|node2\n4|FAILED|0:01|node2")
    found = queue.look(["7_0", "7_1", "6", "5"])
    assert {name: entry.state for name, entry in found.items()} == {
        "7_0": "RUNNING", "7_1": "PENDING", "6": "CANCELLED", "5": "COMPLETED",
    }  # fmt: skip
    assert (found["7_0"].node, found["7_1"].reason) == ("node3", "Resources")
    fake(tmp_path, "sacct", "", code=1)
    assert "6" not in queue.look(["6"]), "no accounts are no error"
    fake(tmp_path, "squeue", "", code=1)
    with pytest.raises(GrassError, match="squeue failed: exit code 1"):
        queue.look(["6"])


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("1:00:00", 60), ("infinite", None), ("2-00:30:00", 2910), ("30:00", 30)],
)
def test_time_limits_of_partitions(tmp_path, monkeypatch, limit, minutes):
    monkeypatch.setenv("PATH", str(tmp_path))
    fake(tmp_path, "sinfo", f"other|9:00:00\nmain*|{limit}")
    assert submit.time_limit(None) == submit.time_limit("main") == minutes
    assert submit.time_limit("other") == 540
    assert submit.time_limit("nowhere") is None


def test_missing_programs_and_package_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(UsageError, match="sbatch, squeue, scancel, srun cannot be found here"):
        queue.require_slurm()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install submitit, or work here with --executor local"):
        queue.require_slurm()


def test_submissions_are_kept_and_the_last_one_of_each_name_counts(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path))
    folder = records.jobs_folder()
    folder.mkdir()
    first = [job(folder, "7_0"), job(folder, "7_1")]
    records.write_submission([first[0]], {})
    later = JobRecord(**{**vars(first[0]), "id": "12", "submitted": "2026-01-03T00:00:00+00:00"})
    records.write_submission([later], {"cpus": 1})
    (folder / "13.submitted.json").write_text("{")
    assert records.all_jobs() == [first[0], later]
    assert records.latest_jobs() == [later]
    assert "13.submitted.json cannot be read" in caplog.text
    assert Path(later.log).parent == folder
    assert later.exit_code is None
