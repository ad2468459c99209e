"""Every template, executed for real by `grass run`; killed in the middle of its bank, it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from grass_lib.baselines import missing_baselines
from grass_lib.experiments import EXPERIMENTS
from grass_lib.runner import verify_run

pytestmark = pytest.mark.system
ROOT = Path(__file__).parents[1]
# Small, but with every cell of the notebook doing its work.
SMALL = {
    "mlp_mnist": ["specs=sjlt-64,random_mask-256->sjlt-64", "n_lds_models=12", "n_trak_models=1", "gallery=1"],
    "gpt2_wikitext": [
        "specs=normal-4*4->identity,random_mask-8*8->sjlt-16,selective_mask-4*4->identity",
        *("n_lds_models=4", "gallery=1", "masks=energy"),
    ],
    "mlp_masks": ["ks=64,128", "n_lds_models=12", "n_trak_models=1", "ways=energy,learned"],
    "musictransformer_maestro": [
        "specs=sjlt-64,selective_mask-256->sjlt-64",
        "n_lds_models=8",
        "n_trak_models=1",
        "gallery=2",
    ],
    "resnet9_cifar2": [
        "specs=sjlt-16,random_mask-64->sjlt-16,selective_mask-16",
        "masks=energy",
        "n_lds_models=6",
        "n_trak_models=1",
        "gallery=1",
    ],
    "logix_comparison": ["systems=grass_lib,bergson", "n_lds_models=4"],
}


def start(name: str, runs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "grass_lib", "run", name, "-q", "--scale", "embedded"]
    for value in SMALL[name]:
        command += ["-p", value]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "GRASS_RUNS": str(runs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def bank(runs: Path) -> dict[str, bytes]:
    files = sorted(runs.glob("shared/*/lds-*/group_*.safetensors"))
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def finish(name: str, runs: Path) -> Path:
    process = start(name, runs)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    (folder,) = (path for path in runs.iterdir() if path.name.startswith(f"{name}-embedded-"))
    assert verify_run(folder) == []
    return folder


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name in SMALL])
def test_killed_in_the_middle_of_the_bank_it_ends_with_the_same_bank(name, tmp_path):
    if name == "logix_comparison" and missing_baselines():
        pytest.skip(missing_baselines())
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(name, whole)
    process = start(name, killed)
    deadline = time.monotonic() + 300
    while not bank(killed) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("shared/*/lds-*/group_*.safetensors")}
    assert kept
    finish(name, killed)
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert bank(killed) == bank(whole)
    assert all(load_file(path) for path in kept)
