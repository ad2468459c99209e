import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from grass_lib.errors import GrassError
from grass_lib.runner import plan, run_all, verify_run
from grass_lib.runner.execute import check_outcomes, execute_run
from grass_lib.runner.lock import run_lock
from grass_lib.runner.verify import load_status


def run(*words, force=False, **options):
    given = dict(word.split("=") for word in words)
    return run_all(plan(["toy"], given=given), progress=False, force=force, **options)[0]


def attempts(folder):
    return len((folder / "store" / "attempts").read_text())


def text_of(folder, name="notebook.ipynb"):
    return (folder / name).read_text()


def test_finished_run_is_whole_and_names_no_path_of_this_machine(finished, executed):
    assert verify_run(finished) == []
    assert {path.name for path in finished.iterdir()} == {
        "notebook.ipynb", "record.json", "status.json", "log.txt", "store", "run.lock",
    }  # fmt: skip
    status = load_status(finished)
    assert (status.exit_code, status.error, status.changed) == (0, None, [])
    assert status.started < status.ended
    for name in ("notebook.ipynb", "record.json", "status.json"):
        text = text_of(finished, name)
        for path in (str(executed.parents[1]), sys.prefix, str(os.path.expanduser("~")) + "/", "/tmp/"):  # noqa: PTH111
            assert path not in text, (name, path)
    notebook = json.loads(text_of(finished))
    printed = json.dumps(notebook)
    assert "root is ." in printed
    assert "look here" in printed, "the warning itself stays"
    assert "10%\\r" not in printed
    assert "papermill" not in notebook["metadata"]
    assert all("papermill" not in cell["metadata"] for cell in notebook["cells"])
    injected = [cell for cell in notebook["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]
    assert finished.name in "".join(injected[0]["source"])


def test_identical_run_is_skipped_until_something_changes(toy, finished):
    assert run().state == "skipped"
    assert attempts(finished) == 1

    toy.fingerprint = lambda scale: "data-2"
    assert plan(["toy"])[0].pending == "the data changed"
    toy.fingerprint = lambda scale: "data-1"

    assert plan(["toy"], given={"seed": "1"})[0].run_id != finished.name
    assert plan(["toy"], given={"seed": "0"})[0].finished, "the default given by hand is the same run"

    toy.modules = ("grass_lib.errors", "grass_lib.specs")
    import grass_lib.experiments

    before = grass_lib.experiments.EXPERIMENTS
    grass_lib.experiments.EXPERIMENTS = toy.registry()
    assert plan(["toy"])[0].pending == "source changed: grass_lib.specs"
    grass_lib.experiments.EXPERIMENTS = before

    outputs = json.loads(toy.template.read_text())
    outputs["metadata"]["kernelspec"] = {"name": "other", "display_name": "Other", "language": "python"}
    toy.template.write_text(json.dumps(outputs))
    assert plan(["toy"])[0].finished, "metadata is not source"
    toy.write("import math", *[c["source"] for c in outputs["cells"][2:]])
    assert plan(["toy"])[0].pending == "the notebook changed"


def test_force_executes_again_and_keeps_the_store(toy, finished):
    outcome = run(force=True)
    assert outcome.state == "done"
    assert attempts(finished) == 2
    assert not (finished / "previous").exists()


def test_failed_cell_is_named_and_the_last_good_run_is_kept(toy, finished):
    outcome = run("act=raise")
    folder = outcome.planned.folder
    assert outcome.state == "failed"
    assert "code cell 4 raised ValueError: seed 0 is unlucky" in outcome.message
    assert (folder / "notebook.part.ipynb").exists()
    assert not (folder / "notebook.ipynb").exists()
    assert "seed 0 is unlucky" in text_of(folder, "log.txt")
    assert load_status(folder).exit_code == 1
    assert any("exit code is 1" in problem and "unlucky" in problem for problem in verify_run(folder))
    pending = plan(["toy"], given={"act": "raise"})[0].pending
    assert pending.startswith("exit code is 1")
    assert "run again" not in pending

    # The very same run, good before, fails now: what was finished stays in previous/ and nothing counts as finished.
    toy.write("1 / 0")
    outcome = run()
    assert outcome.planned.folder == finished
    assert "ZeroDivisionError" in outcome.message
    assert verify_run(finished)
    assert verify_run(finished / "previous") == []


@pytest.mark.parametrize("act", ["exit", "kill"])
def test_dead_kernel_is_a_failure(toy, act):
    outcome = run(f"act={act}")
    assert outcome.state == "failed"
    assert "the kernel died in code cell 4" in outcome.message
    assert (outcome.planned.folder / "notebook.part.ipynb").exists()
    assert (outcome.planned.folder / "log.txt").exists()
    assert verify_run(outcome.planned.folder)


def test_notebook_without_sentinel_fails_although_every_cell_ran(toy):
    outcome = run("act=silent")
    assert outcome.state == "failed"
    assert "sentinel" in outcome.message


def test_full_disk_in_a_cell_says_what_to_do(toy):
    outcome = run("act=full")
    assert "no space left on the disk" in outcome.message
    assert "run the same command again" in outcome.message


def test_full_disk_under_the_runner_is_a_failure_not_a_traceback(toy, finished, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    planned = replace(plan(["toy"])[0], pending="new")
    monkeypatch.setattr("grass_lib.runner.execute._run_worker", lambda *args, **more: (0, None))
    monkeypatch.setattr(os, "fsync", full)
    outcome = execute_run(planned, force=True, progress=False)
    assert outcome.state == "failed"
    assert "no space left" in outcome.message
    assert verify_run(finished / "previous") == []


def test_one_failure_does_not_stop_the_others(toy):
    planned = [plan(["toy"], given={"act": act})[0] for act in ("raise", "good")]
    seen = []
    outcomes = run_all(planned, jobs=2, progress=False, report=seen.append)
    assert [outcome.state for outcome in outcomes] == ["failed", "done"]
    assert len(seen) == 2


def test_experiment_that_cannot_run_here_fails_without_a_folder(toy):
    toy.problems = {"paper": ["there is no GPU here"]}
    (planned,) = plan(["toy"], "paper")
    assert "the scale that works here is embedded" in planned.problems[1]
    outcome = execute_run(planned)
    assert outcome.state == "failed"
    assert "no GPU" in outcome.message
    assert not planned.folder.exists()


def running(pid):
    """Whether a process runs; one that has ended but was not yet waited for by its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_stop_ends_the_kernel(toy):
    (planned,) = plan(["toy"], given={"act": "sleep"})
    stop, outcomes = threading.Event(), []
    thread = threading.Thread(target=lambda: outcomes.append(execute_run(planned, stop=stop, progress=False)))
    thread.start()
    pid_file = planned.folder / "store" / "kernel.pid"
    wait_for(lambda: pid_file.exists() and pid_file.read_text())
    stop.set()
    thread.join(30)
    assert outcomes[0].state == "interrupted"
    wait_for(lambda: not running(int(pid_file.read_text())))
    said = "exit code is 130, interrupted; run the same command again to go on"
    assert verify_run(planned.folder) == [said]
    assert plan(["toy"], given={"act": "sleep"})[0].pending == "going on with an interrupted run"


def test_a_run_of_another_process_is_left_to_it(toy):
    (planned,) = plan(["toy"])
    planned.folder.mkdir(parents=True)
    begun = []
    with run_lock(planned.folder):
        (outcome,) = run_all([planned], progress=False, started=begun.append)
    assert (outcome.state, begun) == ("busy", [])
    assert "is being executed by process" in outcome.message
    with pytest.raises(GrassError, match="left to the processes that execute them: toy-embedded-"):
        check_outcomes([outcome])


@pytest.mark.system
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_kernel_and_end_with_their_code(toy, number, code):
    process = toy.command("run", "toy", "-p", "act=sleep", "-q")
    kernel = started_kernel(toy)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    wait_for(lambda: not running(kernel))


def started_kernel(toy):
    def pids():
        return [path.read_text() for path in toy.runs.glob("*/store/kernel.pid") if path.read_text()]

    wait_for(pids)
    return int(pids()[0])


@pytest.mark.system
def test_killed_runner_takes_its_kernel_along_and_the_next_run_goes_on(toy):
    process = toy.command("run", "toy", "-p", "act=sleep", "-q")
    kernel = started_kernel(toy)
    (folder,) = toy.runs.iterdir()

    second = toy.command("run", "toy", "-p", "act=sleep", "-q")
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 1
    assert f"is being executed by process {process.pid}" in errors
    assert attempts(folder) == 1

    process.kill()
    process.communicate(timeout=30)
    toy.write(
        *[
            cell["source"].replace("time.sleep(60)", "pass")
            for cell in json.loads(toy.template.read_text())["cells"][2:]
        ]
    )
    outcome = run("act=sleep")  # waits for the rest of the killed one
    assert (outcome.state, outcome.message) == ("done", "")
    assert attempts(folder) == 2, "the store of the killed attempt is still there"
    assert not running(kernel)
