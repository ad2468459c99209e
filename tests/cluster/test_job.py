"""A command as a task of submitit, with its executor for one machine."""

import os
import signal
import time

import cluster_toys
import psutil
import pytest

from grass_lib.cluster.job import ClusterJob, stamp_path

submitit = pytest.importorskip("submitit")


def start(folder, words, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    executor = submitit.LocalExecutor(folder / "jobs")
    executor.update_parameters(timeout_min=4, stderr_to_stdout=True)
    return executor.submit(ClusterJob(tuple(words), str(folder), {}, {"GRASS_RUNS": "nowhere"}))


def ended(job, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not job.done():
        assert time.monotonic() < deadline, job.stdout()
        time.sleep(0.1)


def test_exit_code_is_stamped_and_ends_the_job(tmp_path, monkeypatch):
    root = cluster_toys.make(tmp_path / "project")
    job = start(root, ["verify", "nosuch"], cluster_toys.environment(root), monkeypatch)
    ended(job)
    assert stamp_path(root / "jobs", job.job_id).read_text() == "2\n"
    assert "there is no run 'nosuch'" in job.stdout()
    assert not job.paths.result_pickle.exists()


@pytest.mark.system
def test_signal_queues_the_job_again_and_the_next_attempt_goes_on(tmp_path, monkeypatch):
    root = cluster_toys.make(tmp_path / "project")
    (root / "hold").touch()
    job = start(root, ["run", "first", "-q"], cluster_toys.environment(root), monkeypatch)
    deadline = time.monotonic() + 60
    while not (waiting := list(root.glob("runs/*/store/waiting"))):
        assert time.monotonic() < deadline, job.stdout()
        time.sleep(0.1)
    # Slurm signals every process of a job, children first or last.
    (task,) = psutil.Process(int(job.job_id)).children()
    for process in [*task.children(recursive=True), task]:
        os.kill(process.pid, signal.SIGUSR2)
    (root / "hold").unlink()
    ended(job)
    store = waiting[0].parent
    assert (store / "attempts").read_text() == "xx"
    assert (store.parent / "status.json").exists()
    assert stamp_path(root / "jobs", job.job_id).read_text() == "0\n"
    assert "Requeued job" in job.stdout()
