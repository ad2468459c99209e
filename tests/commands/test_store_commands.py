"""`grass store` and `grass attribute` on a toy experiment: typed as users type them."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import zoo
from torch.nn import functional

from grass_lib.attribution.influence import InfluenceFunction
from grass_lib.cli import main
from grass_lib.commands import tasks
from grass_lib.commands.attribute import read_query
from grass_lib.commands.store import parse_worker
from grass_lib.errors import StoreError, UsageError
from grass_lib.experiments.base import AttributionTask
from grass_lib.gradients.outputs import Output
from grass_lib.store import GradientStore
from grass_lib.store.shards import Problem

N, BATCH = 23, 2
SETTINGS = ["--sparsification", "random_mask-3*3", "--projection", "sjlt-4", "--dtype", "float32"]


def loss(model, batch) -> torch.Tensor:
    (ids,) = batch
    following = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = functional.cross_entropy(model(ids).flatten(0, 1), following.flatten(), reduction="none")
    return losses.view(ids.shape).sum(dim=1)


def task(scale: str, parameters, device: str, progress: bool = True) -> AttributionTask:
    (ids,) = zoo.make_samples("text", N)
    loss_function: Output = loss
    return AttributionTask(
        model=zoo.make_model("text"),
        loss=loss_function,
        target=None,
        layers="linear",
        include_head=False,
        train=[(part,) for part in ids.split(BATCH)],
        n_train=N,
        data_sha256="0" * 64,
        encode=lambda text: (torch.tensor([[1 + ord(letter) % 10 for letter in text]]),),
        passage=lambda index: f"passage {index}: " + " ".join(map(str, ids[index].tolist())),
        parameters=parameters,
    )


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path_factory.mktemp("runs")))
    monkeypatch.setattr(
        "grass_lib.runner.planning.experiments_by_name", lambda: {"toy": SimpleNamespace(attribution_task=task)}
    )
    monkeypatch.setattr(
        tasks,
        "planned_source",
        lambda experiment, scale, assignments, here, **stages: tasks.StoreSource(experiment, scale, {}, **stages),
    )


def cache(folder, *more) -> int:
    return main(["store", "cache", "toy", "--store", str(folder), "--shard-size", "4", "-q", *SETTINGS, *more])


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_three_workers_merged_equal_one(tmp_path, capsys):
    assert cache(tmp_path / "one") == 0
    assert "complete" in capsys.readouterr().out
    for worker in range(3):
        assert cache(tmp_path / f"part{worker}", "--worker", f"{worker}/3") == 0
        assert len(GradientStore.open(tmp_path / f"part{worker}").missing()) == 4
        assert "left to other workers" in capsys.readouterr().out
    parts = [str(tmp_path / f"part{worker}") for worker in range(3)]
    assert main(["store", "merge", *parts, "--into", str(tmp_path / "all")]) == 0
    assert content(tmp_path / "all") == content(tmp_path / "one")
    for worker in range(3):
        assert cache(tmp_path / "shared", "--worker", f"{worker}/3") == 0
    assert content(tmp_path / "shared") == content(tmp_path / "one")


@pytest.mark.parametrize("number", range(6))
def test_a_flipped_byte_is_found_and_mended(number, tmp_path, capsys):
    cache(tmp_path)
    before = content(tmp_path)
    assert main(["store", "verify", str(tmp_path), "-q"]) == 0
    file = tmp_path / f"shard_{number:05d}.safetensors"
    changed = bytearray(before[file.name])
    changed[-3 - 17 * number] ^= 4
    file.write_bytes(changed)
    capsys.readouterr()
    assert main(["store", "verify", str(tmp_path), "-q"]) == 1
    shown = capsys.readouterr()
    assert f"shard {number}: damaged" in shown.out
    assert f"`grass store repair {tmp_path}` computes only shard {number} again" in " ".join(shown.err.split())
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard_*") if path != file}
    assert main(["store", "repair", str(tmp_path), "-q"]) == 0
    assert content(tmp_path) == before
    others = {name: when for name, when in kept.items() if f"{number:05d}" not in name}
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in others.items())
    assert main(["store", "repair", str(tmp_path), "-q"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_damaged_store_made_from_python_is_mended_by_what_its_messages_name(tmp_path, capsys, monkeypatch):
    made = task("embedded", {}, "cpu")

    def influence() -> InfluenceFunction:
        return InfluenceFunction(
            made.model, made.loss, layers=made.layers, sparsification="random_mask-3*3", projection="sjlt-4",
            store=tmp_path, shard_size=4, device="cpu", progress=False,
        )  # fmt: skip

    influence().cache(made.train)
    before = content(tmp_path)
    file = tmp_path / "shard_00001.safetensors"
    file.write_bytes(before[file.name][:-5])
    remedy = f"`grass store repair {tmp_path}` removes what is damaged, and cache() of the object that made the store"
    with pytest.raises(StoreError, match=re.escape(remedy)):
        influence().attribute(made.train[:1])
    assert main(["store", "verify", str(tmp_path), "-q"]) == 1
    shown = capsys.readouterr()
    assert remedy in shown.out
    assert remedy in " ".join(shown.err.split())
    # What only cannot be read now may be whole, and stays.
    unreadable = Problem(2, "unreadable", "Input/output error")
    monkeypatch.setattr(GradientStore, "verify", lambda self, **_: [Problem(1, "damaged", ""), unreadable])
    assert main(["store", "repair", str(tmp_path), "-q"]) == 1  # the store is not whole yet
    shown = " ".join(capsys.readouterr().err.split())
    assert "call cache() of the object that made it" in shown
    assert "shards 2 cannot be read and were left as they are" in shown
    assert GradientStore.open(tmp_path).missing() == [1]
    influence().cache(made.train)
    assert content(tmp_path) == before


def test_info_in_words_and_json(tmp_path, capsys):
    cache(tmp_path, "--worker", "0/2")
    capsys.readouterr()
    assert main(["store", "info", str(tmp_path)]) == 0
    assert "3 of 6 shards missing" in capsys.readouterr().out
    assert main(["store", "info", str(tmp_path), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["samples"], value["missing"], value["layers"], value["k"]) == (N, [1, 3, 5], 4, 16)
    assert value["source"]["sparsification"] == "random_mask-3*3"


def test_attribute_prints_and_writes_signed_passages(tmp_path, capsys):
    cache(tmp_path / "store")
    file = tmp_path / "prompt.txt"
    file.write_text("abcdefg")
    capsys.readouterr()
    words = ["attribute", "--store", str(tmp_path / "store"), "-k", "3", "-q", "--json", str(tmp_path / "out.json")]
    assert main([*words, "--query", str(file)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["query"] == "abcdefg"
    scores = [item["score"] for item in found["proponents"]]
    assert scores == sorted(scores, reverse=True)
    assert scores[-1] > found["opponents"][-1]["score"] >= found["opponents"][0]["score"]
    for item in found["proponents"] + found["opponents"]:
        assert item["text"].startswith(f"passage {item['index']}: ")
        assert f"{item['score']:+.4g}" in shown
    source = tasks.StoreSource.of_store(GradientStore.open(tmp_path / "store"))
    made, influence = tasks.influence_of(source, tmp_path / "store", device="cpu", progress=False)
    matrix = influence.attribute([made.encode("abcdefg")], damping=0.1)[:, 0]
    assert found["proponents"][0]["index"] == int(matrix.argmax())
    assert found["opponents"][0]["index"] == int(matrix.argmin())


@pytest.mark.parametrize("command", ["info", "verify", "repair"])
def test_a_mistyped_folder_is_wrong_usage(command, tmp_path, capsys):
    assert main(["store", command, str(tmp_path / "nowhere")]) == 2
    assert "there is no gradient store in" in capsys.readouterr().err


def test_an_unfinished_store_is_not_asked(tmp_path, capsys):
    cache(tmp_path, "--worker", "1/3")
    assert main(["attribute", "--store", str(tmp_path), "--query", "abc", "-q"]) == 2
    assert "4 of 6 shards are missing" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-k", "1000"], "-k is 1000; expected at most 22"),
        (["--damping", "-1"], "--damping is -1.0; expected a finite number above 0"),
        (["--damping", "nan"], "--damping is nan"),
        (["--json", "."], "a folder; expected the name of a file in it"),
        (["--json", "nowhere/a.json"], "whose folder does not exist"),
        (["--query", "/nowhere/prompt.txt"], "there is no such file; expected a prompt"),
        (["--query", "prompt.txt"], "there is no such file; expected a prompt"),
        (["--query", "/"], "--query is the folder '/'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(words, said, tmp_path, capsys, monkeypatch):
    cache(tmp_path)
    monkeypatch.setattr(tasks, "influence_of", None)
    assert main(["attribute", "--store", str(tmp_path), "--query", "abc", *words]) == 2
    assert said.replace("22", str(N)) in " ".join(capsys.readouterr().err.split())


def test_prompts_that_only_look_like_paths(tmp_path, capsys):
    cache(tmp_path)
    for prompt in ("a / b", "a.x?", "a/b"):
        assert main(["attribute", "--store", str(tmp_path), "--query", prompt, "-q"]) == 0
    capsys.readouterr()


def test_the_answer_is_shown_where_it_is_what_was_asked_about(tmp_path, capsys, monkeypatch):
    cache(tmp_path / "store")

    def answered(*given, **named) -> AttributionTask:
        return replace(task(*given, **named), answer=lambda batch: f"so many: {batch[0].shape[1]}")

    monkeypatch.setattr(
        "grass_lib.runner.planning.experiments_by_name", lambda: {"toy": SimpleNamespace(attribution_task=answered)}
    )
    words = ["attribute", "--store", str(tmp_path / "store"), "--query", "abc", "-k", "1"]
    assert main([*words, "--json", str(tmp_path / "found.json")]) == 0
    found = capsys.readouterr()
    assert "made likelier or less likely:\nso many: 3\n" in found.out
    assert "loading model and data of toy" in found.err
    assert json.loads((tmp_path / "found.json").read_text())["answer"] == "so many: 3"


def test_a_prompt_that_is_cut_says_so(tmp_path, capsys, monkeypatch):
    cache(tmp_path / "store")

    def cutting(*given, **named) -> AttributionTask:
        whole = task(*given, **named)
        return replace(
            whole, encode=lambda text: whole.encode(text[:4]), tokens=lambda text: (len(text), min(4, len(text)))
        )

    monkeypatch.setattr(
        "grass_lib.runner.planning.experiments_by_name", lambda: {"toy": SimpleNamespace(attribution_task=cutting)}
    )
    words = ["attribute", "--store", str(tmp_path / "store"), "-k", "1", "--json", str(tmp_path / "found.json")]
    capsys.readouterr()
    assert main([*words, "--query", "abcdefg"]) == 0
    assert (
        "the prompt has 7 tokens, and the model was trained on 4 at once: only the first 4" in capsys.readouterr().err
    )
    cut = json.loads((tmp_path / "found.json").read_text())
    assert cut["tokens"] == {"prompt": 7, "asked": 4}
    assert main([*words, "--query", "abcd"]) == 0
    assert "at once" not in capsys.readouterr().err
    whole = json.loads((tmp_path / "found.json").read_text())
    assert whole["tokens"] == {"prompt": 4, "asked": 4}
    assert whole["proponents"] == cut["proponents"]


def test_folders_of_something_else_are_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    cache(tmp_path / "store")
    (tmp_path / "file").touch()
    monkeypatch.setattr(tasks, "influence_of", None)
    assert cache(tmp_path / "file") == 2
    assert "is a file; expected a folder" in " ".join(capsys.readouterr().err.split())
    assert cache(tmp_path / "store", "--seed", "1") == 1
    assert "seed is 0 there, 1 here" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_store_is_not_compressed(tmp_path, capsys):
    cache(tmp_path / "whole")
    path = tmp_path / "whole" / "shard_00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    words = ["store", "compress", str(tmp_path / "whole"), "--into", str(tmp_path / "small"), "--dtype", "int8", "-q"]
    assert main([*words, "--worker", "0/2"]) == 0  # shard 3 is the other worker's
    assert main([*words, "--worker", "1/2"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "shard_00003.safetensors is damaged" in said
    assert "grass store repair" in said


def test_another_setting_is_refused_with_both_values(tmp_path, capsys):
    cache(tmp_path)
    assert cache(tmp_path, "--seed", "1") == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "seed" in shown
    assert "0" in shown
    assert "1" in shown


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "a/b", "1/0", "0/3/1"])
def test_wrong_workers(text):
    with pytest.raises(UsageError, match="i/n"):
        parse_worker(text)


def test_queries(tmp_path):
    assert read_query("no such file.txt") == "no such file.txt"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_query(str(tmp_path / "binary"))
    with pytest.raises(UsageError, match="empty"):
        read_query("  ")


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_rows_of_codes_are_cached_asked_and_mended(dtype, tmp_path, capsys):
    assert cache(tmp_path, "--dtype", dtype) == 0
    before = content(tmp_path)
    assert main(["attribute", "--store", str(tmp_path), "--query", "abcd", "-k", "2", "-q"]) == 0
    (tmp_path / "shard_00002.safetensors").write_bytes(before["shard_00002.safetensors"][:-1] + b"?")
    assert main(["store", "repair", str(tmp_path), "-q"]) == 0
    assert content(tmp_path) == before
    capsys.readouterr()
    assert main(["store", "info", str(tmp_path)]) == 0
    assert f"k = 16 in all, {dtype}" in capsys.readouterr().out
    assert cache(tmp_path, "--dtype", "float32") == 1
    assert f"dtype is {dtype} there, float32 here" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--rank", "3"], ["--rank", "2", "--dtype", "fp8"]])
def test_a_store_is_compressed_asked_mended_and_compared(options, tmp_path, capsys):
    cache(tmp_path / "whole")
    words = ["store", "compress", str(tmp_path / "whole"), "--into", str(tmp_path / "small"), "-q", *options]
    for worker in ("1/2", "0/2"):
        assert main([*words, "--worker", worker]) == 0
    assert "complete" in capsys.readouterr().out
    before = content(tmp_path / "small")
    assert main(["attribute", "--store", str(tmp_path / "small"), "--query", "abcd", "-k", "2", "-q"]) == 0
    (tmp_path / "small" / "shard_00002.safetensors").write_bytes(before["shard_00002.safetensors"][:-1] + b"?")
    assert main(["store", "verify", str(tmp_path / "small"), "-q"]) == 1
    assert main(["store", "repair", str(tmp_path / "small"), "-q"]) == 0
    assert content(tmp_path / "small") == before
    capsys.readouterr()
    assert main(["store", "info", str(tmp_path / "small")]) == 0
    shown = capsys.readouterr().out
    assert f"compressed from {(tmp_path / 'whole').resolve()}" in shown.replace("\n", "")
    assert ("rank " in shown) == ("--rank" in options)
    assert main(["store", "compare", str(tmp_path / "whole"), str(tmp_path / "small"), "--queries", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_sample"] < 64
    assert 0.5 < found["scores"] <= 1
    (tmp_path / "whole").rename(tmp_path / "moved")
    GradientStore.open(tmp_path / "small").drop(1)
    assert main(["store", "repair", str(tmp_path / "small"), "-q"]) == 1
    assert "which is not there; put it back" in " ".join(capsys.readouterr().err.split())
    assert main([*words[:2], str(tmp_path / "moved"), *words[3:]]) == 0, "said where it is now"
    assert content(tmp_path / "small").keys() == before.keys()


def test_wrong_compressions(tmp_path, capsys):
    cache(tmp_path / "whole")
    words = ["store", "compress", str(tmp_path / "whole"), "--into", str(tmp_path / "small"), "-q"]
    for message, options in {
        "--dtype is 'int4'; expected one of float32, bfloat16, float16, int8, fp8": ["--dtype", "int4"],
        "float32 rows already": [],
        "rank is 0": ["--rank", "0"],
    }.items():
        capsys.readouterr()
        assert main([*words, *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "small").exists()
