"""Several processes on one store give what one process gives; the loss of one is noticed, and nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grass_lib.attribution.influence import InfluenceFunction
from grass_lib.attribution.ranking import TopK, TopKMerge, joined_topk, topk
from grass_lib.errors import UsageError
from grass_lib.gradients.outputs import cross_entropy
from grass_lib.ranks import Ranks
from grass_lib.store import GradientStore

HERE = Path(__file__).parent
PROGRAM = HERE / "rank_program.py"


def torchrun(world, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(PROGRAM)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def found(folder, world):
    return [load_file(folder / f"found-{rank}-of-{world}.safetensors") for rank in range(world)]


def files(folder):
    """Bytes of every shard; there are seven."""
    shards = {path.name: path.read_bytes() for path in (folder / "store").glob("shard_*.safetensors")}
    assert len(shards) == 7
    return shards


def compare(ranks, alone):
    for one in ranks:
        for name in ("scores", "self", "top"):
            error = (one[name] - alone[name]).abs().max() / alone[name].abs().max()
            assert error < 1e-5, name
        assert torch.equal(one["indices"], alone["indices"])
        assert len(one["residuals"]) == len(alone["residuals"])


# 28 layers with 16 features each have fewer than the 37 samples, and with 144 more.
@pytest.mark.system
@pytest.mark.parametrize(
    ("world", "sparsification", "hessian", "extra"),
    [
        (2, "random_mask-4*4", "eFIM", ""),
        (3, "random_mask-12*12", "eFIM", ""),
        (2, "normal-4*4", "Identity", ""),
        (2, "random_mask-4*4", "eFIM", "sharded"),  # 7 shards: one rank has a pass more than the other
    ],
)
def test_ranks_give_what_one_process_gives(tmp_path, world, sparsification, hessian, extra):
    several, alone = tmp_path / "several", tmp_path / "alone"
    for folder, count, words in ((several, world, (extra,)), (alone, 1, ())):
        folder.mkdir()
        ended = torchrun(count, folder, sparsification, hessian, *words)
        assert ended.returncode == 0, ended.stderr
    parts, (whole,) = found(several, world), found(alone, 1)
    compare(parts, whole)
    assert files(several) == files(alone)
    assert sum(float(part["samples"]) for part in parts) == float(whole["samples"]) == 37
    assert all(float(part["samples"]) >= 7 for part in parts)


@pytest.mark.system
def test_a_killed_rank_is_named_and_the_next_run_goes_on(tmp_path):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    broken = torchrun(2, tmp_path / "killed", "random_mask-4*4", "eFIM", 1)
    assert broken.returncode != 0
    assert "Signal 9 (SIGKILL)" in broken.stderr
    assert "rank      : 1" in broken.stderr
    store = GradientStore.open(tmp_path / "killed/store")
    # Without those that were written and not yet noted when their rank was killed: they are computed again.
    finished = set(range(store.n_shards)) - set(store.missing())
    kept = {name: (store.path / name).stat().st_mtime_ns for name in (f"shard_{n:05d}.safetensors" for n in finished)}
    assert kept
    assert torchrun(2, tmp_path / "killed", "random_mask-4*4", "eFIM").returncode == 0
    assert torchrun(1, tmp_path / "whole", "random_mask-4*4", "eFIM").returncode == 0
    for name, when in kept.items():
        assert (store.path / name).stat().st_mtime_ns == when
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    compare(found(tmp_path / "killed", 2), found(tmp_path / "whole", 1)[0])


GONE = """
import os, signal, sys, time
import torch.distributed as dist
from grass_lib.errors import GrassError
from grass_lib.ranks import Ranks
dist.init_process_group("gloo")
ranks, late = Ranks.joined(), sys.argv[1] == "late"
ranks.tell("here")
try:
    with ranks.together("caching"):
        if ranks.rank == 1:
            time.sleep(0 if late else 2)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(2 if late else 0)
except GrassError as error:
    print(error, flush=True)
    os._exit(1)
"""


@pytest.mark.system
@pytest.mark.parametrize("when", ["late", "early"])
def test_without_torchrun_the_first_rank_says_who_is_gone(when):
    """Processes that nobody watches, whether the first rank waits already or comes when the other is dead."""
    environment = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", GONE, when],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [1, -9, 1]
    assert "rank 1 of 3 went away during caching" in said[0]
    assert "start the same command again" in said[0]
    assert "of 3 went away during caching" in said[2]


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_one_process_alone_does_everything():
    alone = Ranks()
    assert alone.alone
    assert all(alone.owns(place) for place in range(3))
    assert alone.tell("x") == ["x"]
    value = torch.ones(2)
    assert alone.add(value) is alone.add_at(0, value) is alone.send(0, value) is value
    with pytest.raises(ValueError, match="mine"), alone.together("work"):
        raise ValueError("mine")


def test_ranks_without_a_group_are_refused():
    with pytest.raises(UsageError, match="torchrun"):
        Ranks.joined()


def test_several_ranks_need_a_folder_and_no_worker(tmp_path):
    model, ranks = torch.nn.Linear(2, 2), Ranks(0, 2)
    with pytest.raises(UsageError, match="a folder that all of them see"):
        InfluenceFunction(model, cross_entropy, ranks=ranks)
    influence = InfluenceFunction(model, cross_entropy, ranks=ranks, store=tmp_path)
    with pytest.raises(UsageError, match="leave it out"):
        influence.cache([(torch.ones(2, 2), torch.zeros(2).long())], worker=0, n_workers=3)


def test_sharded_weights_need_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("grass_lib.attribution.influence.is_sharded", lambda model: True)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match="sharded over ranks"):
        InfluenceFunction(model, cross_entropy)
    with pytest.raises(UsageError, match="compile=False"):
        InfluenceFunction(model, cross_entropy, ranks=Ranks(0, 2), store=tmp_path, compile=True)
    InfluenceFunction(model, cross_entropy, ranks=Ranks(0, 2), store=tmp_path)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_rankings_of_parts_are_the_ranking_of_all(k):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (20, 4), generator=generator).float()  # with many ties
    parts = []
    for rank in range(3):
        merge = TopKMerge(k)
        for start in range(rank * 4, 20, 12):
            merge.update(scores[start : start + 4], start)
        values, indices = (torch.stack(part, dim=1) for part in zip(*merge._ends, strict=True))
        held = values.shape[2]
        padded = TopK(torch.full((4, 2, k), -1), torch.zeros(4, 2, k))
        padded.indices[:, :, :held], padded.scores[:, :, :held] = indices, values
        parts.append(padded)
    wanted, joined = topk(scores, k), joined_topk(parts)
    assert torch.equal(joined.indices, wanted.indices)
    assert torch.equal(joined.scores, wanted.scores)
