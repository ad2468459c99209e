"""The Llama template, executed for real: killed while it caches it goes on, and every phase starts from the disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grass_lib.runner import verify_run

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[1]
SMALL = ["specs=random_mask-16*16->sjlt-64", "n_prompts=1"]


def start(runs: Path, phase: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grass_lib", "run", "llama3_openwebtext", "-q", "-p", f"phase={phase}"]
    for value in SMALL:
        command += ["-p", value]
    environment = {**os.environ, "GRASS_RUNS": str(runs)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(runs: Path, phase: str) -> dict:
    process = start(runs, phase)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    folders = [path for path in runs.iterdir() if path.name.startswith("llama3_openwebtext-embedded-")]
    newest = max((path for path in folders if (path / "record.json").is_file()), key=lambda path: path.stat().st_mtime)
    assert verify_run(newest) == []
    return json.loads((newest / "record.json").read_text())


def shards(runs: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in runs.glob("shared/*/*/gradients/shard_*.json")}


def test_killed_while_caching_it_goes_on_and_phases_start_from_the_disk(tmp_path):
    process = start(tmp_path, "cache")
    deadline = time.monotonic() + 600
    while not shards(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = shards(tmp_path)
    assert 0 < len(kept) < 5
    record = finish(tmp_path, "cache")
    assert record["results"][0]["seconds"] is None  # the attempt that was killed had begun
    assert len(shards(tmp_path)) == 5
    assert {name: shards(tmp_path)[name] for name in kept} == kept
    for phase in ("self_influence", "attribute", "retrieve"):
        record = finish(tmp_path, phase)
        assert record["extra"]["phases"] == [phase]
    assert "cache" not in record["phases"]
    assert record["extra"]["own_article"]["by_chance"] == 0.25
    (found,) = tmp_path.glob("shared/*/*/retrieved.json")
    (passage,) = json.loads(found.read_text())["passages"]
    assert len(passage["proponents"]) == len(passage["opponents"]) == 10
    assert passage["proponents"][0]["score"] > passage["opponents"][0]["score"]
