"""The scaling benchmark: a whole run with two processes on a CPU, checks that can fail, and the page."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grass_lib.bench import scaling, scaling_check, scaling_launch
from grass_lib.bench.scaling_goals import goals
from grass_lib.bench.scaling_launch import Ended
from grass_lib.bench.scaling_shapes import SETTINGS, Plan
from grass_lib.errors import GrassError, UsageError
from grass_lib.report import scaling as page
from grass_lib.report.scaling_plan import plan_rows
from grass_lib.store import GradientStore


def test_a_large_shape_is_not_tried_without_two_gpus():
    with pytest.raises(UsageError, match=r"there are 0 GPUs to use here; expected 2, or --device cpu --shape tiny"):
        scaling.run("llama", device="cpu")


@pytest.mark.system
def test_a_whole_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = tmp_path / "a" / "scaling.json"
    found = scaling.run("tiny", device="cpu", folder=tmp_path / "stores", out=out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    assert list((tmp_path / "stores").iterdir()) == []
    parts = found["parts"]
    assert [part["error"] for part in parts.values()] == [""] * 4
    assert all(goal["met"] for goal in found["goals"])
    assert len(found["goals"]) == 10
    assert [each["samples"] for each in parts["caching"]["ranks_2"]] == [12, 12]
    assert parts["caching"]["ranks_1"][0]["steady_rows"] == 16
    assert parts["caching"]["store"]["same_checksums"] == 6
    # Not all rows fit one decomposition: the large work decomposes rows, the small one sums.
    assert parts["curvature"]["sums_2"][0]["eigen_size"] == 32
    for each in parts["fsdp"]["ranks_2"]:
        assert 0.4 < each["own_weight_bytes"] / each["weight_bytes"] < 0.6
    assert parts["fsdp"]["ranks_1"][0]["own_weight_bytes"] == parts["fsdp"]["ranks_1"][0]["weight_bytes"]
    kill = parts["kill"]
    assert (kill["code"], kill["resumed_code"], kill["kept_unchanged"], kill["names_rank"]) == (1, 0, True, True)
    assert 0 < kill["shards_kept"] < kill["shards"]
    assert sum(kill["resumed_rows"]) == 48 - 4 * kill["shards_kept"]
    assert [(each["task"], each["ranks"], each["code"]) for each in found["launches"]] == [
        *(("main", 1, 0), ("main", 2, 0), ("small", 1, 0), ("fsdp", 2, 0), ("kill", 2, 1), ("kill", 2, 0)),
    ]
    assert "main with 2: exit code 0" in caplog.text
    assert str(Path(__file__).parents[2]) not in out.read_text()
    texts = {path.name: path.read_text() for path in page.write_scaling_parts(out.parent, tmp_path / "generated")}
    assert "All 6 shards have the checksums" in texts["scaling_caching.md"]
    assert "rank 1" in texts["scaling_kill.md"].lower()
    assert not any("Not measured" in text for text in texts.values())


@pytest.mark.system
def test_a_launch_that_hangs_is_ended_and_a_failed_part_says_why(tmp_path):
    main, small = SETTINGS["tiny"]
    plan = Plan("cpu", main, small, False, tmp_path)
    ended = scaling_launch.launch(plan, "main", 1, timeout=0.5)
    assert (ended.code, ended.results) == (-9, [{}])
    assert "stopped after" in ended.text
    broken = Plan("cpu", replace(main, spec="random_mask-8*8->nothing-3"), small, False, tmp_path)
    bench = scaling.Scaling(broken, tmp_path / "out.json", 200.0)
    bench.measure("caching")
    written = json.loads((tmp_path / "out.json").read_text())
    assert "before rank 0 had any caching" in written["parts"]["caching"]["error"]
    assert "nothing-3" in written["launches"][0]["said"]


def store(folder, rows, shard=2):
    made = GradientStore.create(
        folder, layers={"a": 3, "b": 2}, n_samples=len(rows), shard_size=shard, fingerprint={"x": 1}
    )
    for number in range(made.n_shards):
        part = made.shard_rows(number)
        made.write(
            number, {"a": rows[part.start : part.stop, :3].clone(), "b": rows[part.start : part.stop, 3:].clone()}
        )
    return folder


def test_stores_that_differ_are_told_apart(tmp_path):
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    wanted = store(tmp_path / "one", rows)
    same = scaling_check.compare_stores(store(tmp_path / "same", rows), wanted)
    assert (same["same_checksums"], same["shards"], same["worst_row"], same["problems"]) == (3, 3, 0.0, [])
    other = rows.clone()
    other[3] += 0.1 * rows[3]
    found = scaling_check.compare_stores(store(tmp_path / "other", other), wanted)
    assert (found["same_files"], found["same_checksums"]) == (True, 2)
    assert found["worst_row"] == pytest.approx(0.1, rel=1e-4)
    cut = scaling_check.compare_stores(store(tmp_path / "cut", rows, shard=3), wanted)
    assert (cut["same_files"], cut["worst_row"]) == (False, None)
    path = tmp_path / "same" / "shard_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert scaling_check.compare_stores(tmp_path / "same", wanted)["problems"]


def test_the_worst_rank_decides_over_scores(tmp_path):
    exact = torch.tensor([[1.0, -4.0]])
    save_file({"scores": exact}, str(tmp_path / "scores-small-0-of-1.safetensors"))
    save_file({"scores": exact.clone()}, str(tmp_path / "scores-fsdp-0-of-2.safetensors"))
    save_file({"scores": exact + 0.2}, str(tmp_path / "scores-fsdp-1-of-2.safetensors"))
    assert scaling_check.compare_scores(tmp_path, "fsdp", 2, "small") == pytest.approx(0.05)


def on_gpus():
    """What a result of two GPUs looks like, with made-up numbers."""
    same = {"shards": 18, "same_files": True, "same_checksums": 18, "worst_row": 0.0, "bytes": 576e6, "problems": []}
    sums = {"layers": 225, "bytes": 15e9, "reduce_seconds": 0.1, "sum_seconds": 1.0, "eigen_seconds": 2.0}
    sums |= {"eigen_size": 4096, "error": 1e-7, "peak_bytes": 40e9}
    kill = {"seconds_to_error": 3.0, "names_rank": True, "code": 1, "kept_unchanged": True, "shards_kept": 3}
    main, _ = SETTINGS["llama"]
    return {
        "device_type": "cuda",
        "main": {"rows": main.rows, "block": main.block},
        "parts": {
            "caching": {"speedup": 1.95, "tokens_per_second_2": 36000.0, "store": same},
            "curvature": {"score_error": 1e-7, "sums_1": [sums], "sums_2": [sums, {**sums, "reduce_seconds": 0.15}]},
            "kill": {**kill, "resumed_code": 0, "store": same, "score_error": 0.0},
        },
    }


def missed(result):
    return [goal["goal"] for goal in goals(result) if not goal["met"]]


def test_goals_are_judged():
    assert missed(on_gpus()) == []
    assert len(goals(on_gpus())) == 9
    for part, change in (
        ("caching", {"speedup": 1.8}),
        ("caching", {"store": {"worst_row": None, "problems": []}}),
        ("caching", {"store": {"worst_row": 0.0, "problems": ["damaged"]}}),
        ("curvature", {"score_error": 1e-3}),
        ("curvature", {"sums_2": [{"error": 1e-3}]}),
        ("kill", {"seconds_to_error": 61.0}),
        ("kill", {"names_rank": False}),
        ("kill", {"code": 0}),
        ("kill", {"kept_unchanged": False}),
        ("kill", {"shards_kept": 0}),
        ("kill", {"resumed_code": 1}),
    ):
        result = on_gpus()
        result["parts"][part] |= change
        assert len(missed(result)) == 1, change
    slow = on_gpus() | {"device_type": "cpu"}
    slow["parts"]["caching"]["speedup"] = 1.0
    assert missed(slow) == []


def test_the_plan_follows_from_measured_rates():
    two, host, many = plan_rows(on_gpus())
    assert [row["gpus"] for row in (two, host, many)] == [2, 8, 64]
    assert many["tokens_per_second"] == pytest.approx(32 * 36000)
    assert two["hours"] == pytest.approx(1e9 / 36000 / 3600)
    assert host["disk_bytes_per_second"] == pytest.approx(4 * 36000 / 1024 * 1e6)
    # The slower rank's link is 100 GB/s; between hosts 50 GB/s are assumed.
    assert (host["reduce_seconds"], many["reduce_seconds"]) == (pytest.approx(0.15), pytest.approx(0.3))
    assert (two["eigen_seconds"], host["eigen_seconds"], many["eigen_seconds"]) == (226.0, 58.0, 8.0)
    without = on_gpus()
    del without["parts"]["curvature"]["sums_2"]
    assert plan_rows(without) == []


def test_the_page_says_what_was_not_measured(tmp_path):
    measured, generated = tmp_path / "measured", tmp_path / "generated"
    written = page.write_scaling_parts(measured, generated)
    assert all("Not measured yet" in path.read_text() for path in written)
    text = (Path(__file__).parents[2] / "book" / "scaling.md").read_text()
    assert all(f"_generated/{path.name}" in text for path in written)
    assert "it was left out of the run" in page.fsdp_section(on_gpus())
    assert "no luck" in page.caching_section({"parts": {"caching": {"error": "no luck\nat all"}}})
    measured.mkdir()
    for wrong in ("{", "[]", '{"parts": {}}'):
        (measured / "scaling.json").write_text(wrong)
        with pytest.raises(GrassError, match="run `grass bench scaling --json PATH` again"):
            page.load(measured)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"shape": "huge"}, "expected one of llama, tiny"),
        ({"parts": ["cashing"]}, "cashing"),
        ({"parts": []}, "some of caching"),
        ({"rows": 8}, "a multiple of 8 above it"),
        ({"rows": 20}, "a multiple of 8 above it"),
        ({"rows": -8}, "rows is -8"),
        ({"batch": -1}, "batch -1"),
    ],
)
def test_wrong_arguments(tmp_path, changes, match):
    with pytest.raises(UsageError, match=match):
        scaling.run(**{"shape": "tiny", "device": "cpu", "folder": tmp_path, **changes})
    assert list(tmp_path.iterdir()) == []


def test_one_gpu_is_too_few(monkeypatch):
    monkeypatch.setattr(scaling, "resolve_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="there are 1 GPUs to use here"):
        scaling.run("llama")


def test_batches_decide_over_shards():
    main, _ = SETTINGS["llama"]
    assert (main.changed(0, 12).batch, main.changed(0, 12).shard) == (12, 24)
    assert main.changed(0, 0) == main
    assert (main.rows - main.warm_up) // main.shard % 2 == 0


def test_plans_survive_the_file(tmp_path):
    plan = Plan("cpu", *SETTINGS["tiny"], True, tmp_path)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    row = {"steady_seconds": 1.0, "steady_rows": 16, "samples": 24, "peak_bytes": None}

    def launched(plan, task, world, *, timeout):
        return Ended(0 if world == 1 else 1, 1.0, 0.0, [{"caching": row}] if world == 1 else [{}, {}], "it broke")

    monkeypatch.setattr(scaling, "launch", launched)
    bench = scaling.Scaling(Plan("cpu", *SETTINGS["tiny"], False, tmp_path), tmp_path / "out.json", 1.0)
    bench.measure("caching")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["parts"]["caching"]["ranks_1"] == [row]
    assert "it broke" in written["parts"]["caching"]["error"]
    assert "it broke" in scaling.summary(written)
