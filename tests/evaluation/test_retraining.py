import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import banks
import pytest
import torch
from banks import FINGERPRINT, PLAN, TinyTrainer, tiny_bank

from grass_lib.errors import BankError, UsageError
from grass_lib.evaluation import BankPlan, RetrainingBank, TrainedGroup, load_weights

ROOT = Path(__file__).parents[2]


class KilledError(Exception):
    """Stands for a process that ends in the middle of training."""


def stop_at(number):
    def stop(n):
        if n == number:
            raise KilledError

    return stop


def same(first, second):
    return (
        torch.equal(first.subsets, second.subsets)
        and torch.equal(first.outputs.nan_to_num(9.0), second.outputs.nan_to_num(9.0))
        and torch.equal(first.seeds, second.seeds)
        and all(
            torch.equal(a.nan_to_num(9.0), second.metrics[name].nan_to_num(9.0)) for name, a in first.metrics.items()
        )
    )


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_bank_holds_what_the_trainer_gave(tmp_path):
    bank = tiny_bank(tmp_path)
    assert torch.equal(bank.subsets, PLAN.subsets())
    assert bank.outputs.shape == (6, 2, banks.N_QUERY)
    assert bank.outputs[:3].isfinite().all()
    assert bank.outputs[3:, 1].isnan().all()
    for member in chain.from_iterable(PLAN.groups()):
        alone = TinyTrainer()(PLAN.subset_indices(member.index)[None], [member])
        assert torch.equal(bank.outputs[member.index, member.repeat], alone.outputs[0])
        assert bank.metrics["norm"][member.index, member.repeat] == alone.metrics["norm"][0]
        assert bank.seeds[member.index, member.repeat] == member.number
    assert (bank.seeds[3:, 1] == -1).all()
    assert not torch.equal(bank.outputs[0, 0], bank.outputs[0, 1])


def test_a_finished_bank_is_not_trained_again(tmp_path):
    first = tiny_bank(tmp_path)
    before = contents(tmp_path)
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path, trainer), first)
    assert same(RetrainingBank.load(tmp_path), first)
    assert trainer.calls == 0
    assert contents(tmp_path) == before
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("group", [0, 1, 4])
def test_resumes_at_the_first_missing_group(tmp_path, group):
    whole = tiny_bank(tmp_path / "whole", keep_weights=True)
    with pytest.raises(KilledError):
        tiny_bank(tmp_path / "part", TinyTrainer(stop_at(group)), keep_weights=True)
    with pytest.raises(BankError, match=f"lacks group {group} of 5"):
        RetrainingBank.load(tmp_path / "part")
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path / "part", trainer, keep_weights=True), whole)
    assert trainer.calls == 5 - group
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", range(1, 12))
def test_killed_at_any_write(tmp_path, monkeypatch, at):
    """Whatever write of a group is the last one, the next run ends with the same files."""
    plan = BankPlan(n_train=banks.N_TRAIN, n_models=4, group_size=2, second_seed_share=0.0)
    tiny_bank(tmp_path / "whole", plan=plan, keep_weights=True)
    writes = 0
    replace = Path.replace

    def failing(self, target):
        nonlocal writes
        writes += 1
        if writes == at:
            raise KilledError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(KilledError):
        tiny_bank(tmp_path / "part", plan=plan, keep_weights=True)
    monkeypatch.setattr(Path, "replace", replace)
    assert list(tmp_path.rglob("*.tmp"))
    tiny_bank(tmp_path / "part", plan=plan, keep_weights=True)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_damaged_group_is_named_and_only_it_is_trained_again(tmp_path):
    whole = tiny_bank(tmp_path)
    path = tmp_path / "group_001.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    flip(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    trainer = TinyTrainer()
    for read in (lambda: tiny_bank(tmp_path, trainer), lambda: RetrainingBank.load(tmp_path)):
        with pytest.raises(BankError, match=f"group_001.safetensors is damaged.*{found}.*{expected}.*delete this file"):
            read()
    assert trainer.calls == 0
    path.unlink()
    assert same(tiny_bank(tmp_path, trainer), whole)
    assert trainer.trained == ["lds/2/0", "lds/3/0"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_damaged_json_is_named(tmp_path, content):
    whole = tiny_bank(tmp_path)
    (tmp_path / "group_002.json").write_bytes(content)
    with pytest.raises(BankError, match=r"group_002\.json.*only group 2"):
        tiny_bank(tmp_path)
    (tmp_path / "group_002.json").unlink()
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path, trainer), whole)
    assert trainer.calls == 1
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(BankError, match=r"manifest\.json"):
        tiny_bank(tmp_path)
    with pytest.raises(BankError, match=r"manifest\.json"):
        RetrainingBank.load(tmp_path)


def test_missing_manifest(tmp_path):
    whole = tiny_bank(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BankError, match=r"no manifest\.json"):
        RetrainingBank.load(tmp_path)
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path, trainer), whole)  # the groups carry the fingerprint too, nothing is lost
    assert trainer.calls == 0
    assert same(RetrainingBank.load(tmp_path), whole)


def test_missing_manifest_and_groups_of_another_bank(tmp_path):
    tiny_bank(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(BankError, match=r"group_000\.json belongs to another bank"):
        tiny_bank(tmp_path, fingerprint="other")


def test_another_recipe_is_refused_with_both_values(tmp_path):
    tiny_bank(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(BankError, match=f"holds another bank.*recipe and data are {FINGERPRINT}, expected other"):
        tiny_bank(tmp_path, fingerprint="other")
    with pytest.raises(BankError, match="seed is 3, expected 4"):
        tiny_bank(tmp_path, plan=BankPlan(n_train=40, n_models=6, seed=4, group_size=2))
    with pytest.raises(BankError, match="group_size is 2, expected 3"):
        tiny_bank(tmp_path, plan=BankPlan(n_train=40, n_models=6, seed=3, group_size=3))
    assert contents(tmp_path) == before


def test_a_manifest_that_was_edited(tmp_path):
    tiny_bank(tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "plan": {**content["plan"], "seed": 9}}))
    with pytest.raises(BankError, match="holds another bank"):
        RetrainingBank.load(tmp_path)
    path.write_text(json.dumps({**content, "plan": {**content["plan"], "extra": 9}}))
    with pytest.raises(BankError, match=r"manifest\.json is damaged"):
        RetrainingBank.load(tmp_path)


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (torch.zeros(2, 3), "a Tensor"),
        (None, "a NoneType"),
        (TrainedGroup([[0.0]]), "a TrainedGroup whose outputs are a list"),
    ],
)
def test_a_trainer_that_returns_something_else_is_told_what_to_return(returned, seen, tmp_path):
    with pytest.raises(UsageError, match=rf"returned {seen}; expected a grass_lib\.evaluation\.TrainedGroup"):
        tiny_bank(tmp_path, lambda subsets, members: returned)


def test_full_disk(tmp_path, monkeypatch):
    whole = tiny_bank(tmp_path / "whole")
    fsync, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls == 9:  # manifest 2, each group 4 (file and folder, twice)
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BankError, match=r"could not be written: the disk .* is full; free some space"):
        tiny_bank(tmp_path / "part")
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list(tmp_path.rglob("*.tmp"))
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path / "part", trainer), whole)
    assert trainer.calls == 4


def test_file_size_limit_of_the_system(tmp_path):
    """The same with a real refusal of the operating system instead of a patched call."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    plan = BankPlan(n_train=4000, n_models=2, second_seed_share=0.0)

    def trainer(subsets, members):
        return TrainedGroup(torch.zeros(len(members), 100))

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(BankError, match=r"group_000\.safetensors .* could not be written"):
            tiny_bank(tmp_path, trainer, plan=plan)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(contents(tmp_path)) == ["manifest.json"]
    assert tiny_bank(tmp_path, trainer, plan=plan).n_models == 2


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match="could not be made"):
        tiny_bank(tmp_path / "file" / "bank")


def test_weights_are_kept_and_read(tmp_path):
    tiny_bank(tmp_path, keep_weights=True)
    states = load_weights(tmp_path)
    assert len(states) == 6
    for index, state in enumerate(states):
        member = PLAN.groups()[index // 2][index % 2]
        alone = TinyTrainer()(PLAN.subset_indices(index)[None], [member])
        assert torch.equal(state["w"], alone.state_dicts[0]["w"])


def test_missing_weights_are_trained_again_and_outputs_kept(tmp_path):
    whole = tiny_bank(tmp_path)
    outputs = {name: content for name, content in contents(tmp_path).items() if name.startswith("group")}
    with pytest.raises(BankError, match="no complete weights of group 0"):
        load_weights(tmp_path)
    assert same(tiny_bank(tmp_path, keep_weights=True), whole)
    kept = load_weights(tmp_path)
    (tmp_path / "weights" / "model_003.safetensors").unlink()
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path, trainer, keep_weights=True), whole)
    assert trainer.trained == ["lds/2/0", "lds/3/0"]
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(load_weights(tmp_path), kept, strict=True))
    assert outputs.items() <= contents(tmp_path).items()


def test_damaged_weights_are_named(tmp_path):
    tiny_bank(tmp_path, keep_weights=True)
    flip(tmp_path / "weights" / "model_001.safetensors")
    with pytest.raises(BankError, match=r"model_001\.safetensors is damaged"):
        load_weights(tmp_path)
    with pytest.raises(BankError, match=r"model_001\.safetensors is damaged"):
        tiny_bank(tmp_path, keep_weights=True)
    tiny_bank(tmp_path)  # the outputs do not need them


def test_weights_of_other_models_are_refused(tmp_path):
    tiny_bank(tmp_path)

    class Changed(TinyTrainer):
        def __call__(self, subsets, members):
            group = super().__call__(subsets, members)
            return TrainedGroup(group.outputs.roll(1, 0), group.state_dicts)

    with pytest.raises(BankError, match="not those whose outputs are stored"):
        tiny_bank(tmp_path, Changed(), keep_weights=True)
    assert not list(tmp_path.glob("weights/*"))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (TrainedGroup(torch.full((2, 7), torch.nan), [{}, {}]), r"lds/0/0, lds/1/0 gave outputs that are not finite"),
        (TrainedGroup(torch.zeros(3, 7), [{}, {}]), r"\(3, 7\) for 2 models"),
        (TrainedGroup(torch.zeros(2, 7)), r"no weights for 2 models"),
    ],
)
def test_what_a_trainer_may_not_return(tmp_path, group, message):
    with pytest.raises(BankError, match=message):
        tiny_bank(tmp_path, lambda subsets, members: group, keep_weights=True)
    assert list(contents(tmp_path)) == ["manifest.json"]


def test_a_moved_bank_still_reads(tmp_path):
    whole = tiny_bank(tmp_path / "here", keep_weights=True)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert same(RetrainingBank.load(tmp_path / "there"), whole)
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "there").values())


def test_a_second_process_waits_and_trains_nothing(tmp_path):
    """Two trainings of one folder at once: the later one finds what the earlier one has made."""
    started, go_on, results = threading.Event(), threading.Event(), {}

    def hold(n):
        started.set()
        go_on.wait(30)

    def run(name, trainer):
        results[name] = tiny_bank(tmp_path, trainer)

    late = TinyTrainer()
    threads = [threading.Thread(target=run, args=("first", TinyTrainer(hold)))]
    threads[0].start()
    started.wait(30)
    threads.append(threading.Thread(target=run, args=("second", late)))
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert late.calls == 0
    assert same(results["first"], results["second"])


@pytest.mark.system
@pytest.mark.parametrize("group", [0, 2])
def test_killed_process(tmp_path, group):
    """A process that is killed by SIGKILL in the middle of a group leaves a folder that the next run completes."""
    whole = tiny_bank(tmp_path / "whole", keep_weights=True)
    command = [sys.executable, banks.__file__, str(tmp_path / "part"), str(group)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    process.kill()
    assert process.wait(30) == -signal.SIGKILL
    assert len(list((tmp_path / "part").glob("group_*.json"))) == group
    trainer = TinyTrainer()
    assert same(tiny_bank(tmp_path / "part", trainer, keep_weights=True), whole)
    assert trainer.calls == 5 - group
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
