import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import toy_project

from grass_lib.errors import GrassError, RecordError, UsageError
from grass_lib.report import record as record_module
from grass_lib.report.files import write_atomic
from grass_lib.report.record import Run, load_record, parse_record
from grass_lib.report.scrub import has_absolute_path, scrub_json, scrub_text
from grass_lib.report.values import seconds_fields


@pytest.fixture
def project(tmp_path, monkeypatch):
    toy = toy_project.make(tmp_path / "project")
    monkeypatch.setenv("GRASS_ROOT", str(toy.root))
    monkeypatch.setenv("GRASS_RUNS", str(toy.runs))
    monkeypatch.setattr("grass_lib.experiments.EXPERIMENTS", toy.registry(), raising=False)
    return toy


def begin(**more):
    return Run.begin(**{"experiment": "toy", "scale": "embedded", "parameters": {"seed": 1}, "run_id": "toy-1", **more})


LDS = {"mean": 0.4, "interval": [0.3, 0.5], "n_models": 30, "n_queries": 90, "n_undefined": 0}


def finished(run):
    run.describe_data(source="made up", rows=3, sha256="0" * 64, kind="embedded")
    run.result(attributor="trak", projection="sjlt-256", lds=LDS, damping=0.1, projection_seconds=0.5)
    return run.finish()


def test_record_says_everything_and_round_trips(project):
    run = begin()
    with run.phase("bank"):
        run.path("bank", "a.json").write_text("12345")
    run.note("accuracy", np.float32(0.5))
    line = finished(run)
    path = project.runs / "toy-1" / "record.json"
    record = load_record(path)
    assert re.fullmatch(rf"grass-run-complete toy-1 {record_module.write_atomic(path, path.read_bytes())}", line)
    assert repr(line) == str(line), "shown without quotes as the value of a cell"
    assert parse_record(json.dumps(record.to_json())) == record
    assert record.parameters == {"seed": 1}
    assert record.stored_bytes == 5
    assert record.peak_bytes > 10**6
    assert record.extra == {"accuracy": 0.5}
    assert set(record.modules) == {"grass_lib.errors"}
    assert record.versions["python"].startswith("3.")
    assert record.git_commit is None
    assert record.device["memory_bytes"] > 10**6
    (row,) = record.results
    assert (row["spec"], row["k"], row["operator"], row["backend"]) == ("sjlt-256", 256, "sjlt", None)
    assert not list((project.runs / "toy-1").glob(".*tmp"))


def test_source_hash_follows_the_template(project):
    finished(begin())
    first = load_record(project.runs / "toy-1" / "record.json")
    project.write("1 + 1")
    finished(begin(run_id="toy-2"))
    second = load_record(project.runs / "toy-2" / "record.json")
    assert first.source_hash != second.source_hash
    assert first.modules == second.modules


def test_phases_add_up_also_when_they_fail(project):
    run = begin()
    for _ in range(2):
        with run.phase("wait"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), run.phase("fail"):
        raise ZeroDivisionError
    finished(run)
    phases = load_record(project.runs / "toy-1" / "record.json").phases
    assert 0.04 <= phases["wait"] < 1
    assert set(phases) == {"wait", "fail"}


def test_runs_by_hand_get_names_of_their_own(project):
    names = {begin(run_id="").run_id for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("toy-embedded-manual-") for name in names)


@pytest.mark.parametrize(
    "run_id", ["../x", "a/b", "/abs", "..", ".", "a b", "a\\b", "x" * 129, "-x", "a..b", "é", "a\n", "shared"]
)
def test_run_id_is_never_a_path(project, run_id):
    with pytest.raises(UsageError, match="expected up to 128 letters"):
        begin(run_id=run_id)
    assert not project.runs.exists()


@pytest.mark.parametrize("name", ["../record.json", "/etc/passwd", "a/../../b", ".."])
def test_store_cannot_be_left(project, name):
    with pytest.raises(UsageError, match="leaves the run's folder"):
        begin().path(name)


def test_store_cannot_be_left_through_a_link(project, tmp_path):
    run = begin()
    (run.store / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="leaves the run's folder"):
        run.path("link", "x")


def test_shared_folder_is_one_for_all_runs_of_a_scale(project):
    folder = begin().shared("networks")
    assert folder == begin(run_id="toy-2").shared("networks") == project.runs / "shared" / "toy-embedded-networks"
    assert folder.is_dir()
    assert begin(scale="paper").shared("networks") != folder
    with pytest.raises(UsageError, match="not a plain name"):
        begin().shared("../networks")


def test_measurements_are_kept_for_later_attempts(project):
    assert begin().keep("seconds-a", None) is None
    assert begin().keep("seconds-a", {"gradients": 1.5}) == {"gradients": 1.5}
    assert begin().keep("seconds-a", None) == {"gradients": 1.5}
    assert begin().keep("seconds-a", {"gradients": 2.0}) == {"gradients": 2.0}
    with pytest.raises(UsageError, match="plain name"):
        begin().keep("../a", None)


def test_wrong_use_is_explained(project):
    with pytest.raises(UsageError, match="scale is 'huge', expected 'embedded' or 'paper'"):
        begin(scale="huge")
    run = begin()
    with pytest.raises(UsageError, match=r"call run.describe_data"):
        run.finish()
    with pytest.raises(UsageError, match="data kind is 'fake', expected one of official"):
        run.describe_data(source="x", rows=1, sha256="0", kind="fake")
    with pytest.raises(UsageError, match="note is nan"):
        run.note("note", float("nan"))
    with pytest.raises(UsageError, match="note is a object"):
        run.note("note", object())
    with pytest.raises(UsageError, match=r"lds.mean is nan"):
        run.result(attributor="trak", projection="sjlt-8", lds={**LDS, "mean": float("nan")})
    with pytest.raises(RecordError, match=r"lds.mean is 1.5, expected a correlation"):
        run.result(attributor="trak", projection="sjlt-8", lds={**LDS, "mean": 1.5})
    assert run.results == []


def test_results_take_the_library_objects(project):
    import torch

    from grass_lib.specs import CompressionSpec

    @dataclass
    class Ceiling:
        mean: float
        interval: tuple[float, float]

    @dataclass
    class Result:
        mean: torch.Tensor
        interval: tuple[float, float]
        n_models: int
        n_queries: int
        n_undefined: int
        noise_ceiling: Ceiling
        per_query: torch.Tensor

    result = Result(torch.tensor(0.25), (0.125, 0.5), 30, 90, 0, Ceiling(0.75, (0.5, 0.875)), torch.zeros(90))
    spec = CompressionSpec.parse(sparsification="random_mask-16*16", projection="identity")
    row = begin().result(
        attributor="trak", spec=spec, lds=result, damping=torch.tensor(0.5), damping_convention="paper"
    )
    assert row["lds"] == {"mean": 0.25, "interval": [0.125, 0.5], "n_models": 30, "n_queries": 90, "n_undefined": 0}
    assert row["noise_ceiling"] == {"mean": 0.75, "interval": [0.5, 0.875]}
    assert (row["sparsification"], row["projection"], row["operator"]) == (
        "random_mask-16*16",
        "identity",
        "random_mask",
    )
    assert (row["damping"], row["damping_convention"]) == (0.5, "paper")


def test_no_path_of_this_machine_gets_in(project, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", "/some/where/data")
    run = begin(parameters={"where": str(project.root / "x")})
    run.note("paths", [f"{sys.prefix}/lib", "/some/where/data/mnist", "/strange/place/file.txt", Path("/a/b/c")])
    finished(run)
    text = (project.runs / "toy-1" / "record.json").read_text()
    record = parse_record(text)
    assert record.extra["paths"] == ["<env>/lib", "$GRASS_DATA/mnist", "<path>/file.txt", "<path>/c"]
    assert record.parameters == {"where": "./x"}
    assert not has_absolute_path(text)


def test_scrubbing_leaves_other_text_alone():
    for text in ("https://example.org/a/b", "and/or, 1/2", "<div>a</div>", "runs/x/y", "$GRASS_DATA/mnist/a", "a -> b"):
        assert scrub_json(text) == scrub_text(text) == text
    assert scrub_text("/tmp/ipykernel_12/345.py:3: UserWarning") == "<cell>:3: UserWarning"
    assert scrub_text(f"at {Path.home()}/x") == "at ~/x"
    neighbour = f"{Path.home()}-other/x"
    assert scrub_text(neighbour) == neighbour


def test_full_disk_keeps_the_record_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GrassError, match="no space left on the disk"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def value(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        toy = toy_project.make(tmp_path_factory.mktemp("record") / "project")
        patch.setenv("GRASS_ROOT", str(toy.root))
        patch.setenv("GRASS_RUNS", str(toy.runs))
        patch.setattr("grass_lib.experiments.EXPERIMENTS", {}, raising=False)
        finished(begin())
        return json.loads((toy.runs / "toy-1" / "record.json").read_text())


@pytest.mark.parametrize(
    ("place", "bad"),
    [
        ("schema_version", 2),
        ("schema_version", True),
        ("run_id", "../x"),
        ("experiment", ""),
        ("scale", "huge"),
        ("status", "failed"),
        ("data", []),
        ("data.kind", "guess"),
        ("parameters", []),
        ("results", {}),
        ("results", [1]),
        ("phases", {"a": -1}),
        ("phases", {"a": "1"}),
        ("phase_peak_bytes", {"a": 1.5}),
        ("peak_bytes", -1),
        ("stored_bytes", True),
        ("tokens_per_second", "fast"),
        ("device", {}),
        ("versions", {"a": 1}),
        ("source_hash", "abc"),
        ("modules", {"a": "b"}),
        ("git_commit", ""),
        ("started", "yesterday"),
        ("started", "2026-01-01T00:00:00"),
        ("finished", "2001-01-01T00:00:00+00:00"),
        ("extra", {"log": "/home/someone/x"}),
        ("results.0.attributor", None),
        ("results.0.k", -1),
        ("results.0.lds", 0.4),
        ("results.0.lds.mean", None),
        ("results.0.lds.interval", [0.5, 0.3]),
        ("results.0.lds.n_models", 1.5),
        ("results.0.noise_ceiling", {"mean": 0.5}),
        ("results.0.damping", -1),
        ("results.0.damping_convention", "mine"),
        ("results.0.projection_seconds", -0.1),
        ("results.0.backend", 3),
    ],
)
def test_every_field_is_checked(value, place, bad):
    changed = json.loads(json.dumps(value))
    parse_record(json.dumps(changed))  # it is good before
    holder, *rest = [changed], *[[key] for key in place.split(".")]
    target, names = holder[0], [key for (key,) in rest]
    for name in names[:-1]:
        target = target[int(name) if name.isdigit() else name]
    target[names[-1]] = bad
    name = re.sub(r"\.(\d+)", r"[\1]", place)
    with pytest.raises(RecordError, match=rf"{re.escape(name)}[\w.\[\]]* is .*, expected .*; run the notebook again"):
        parse_record(json.dumps(changed))


def test_missing_and_unknown_fields(value):
    with pytest.raises(RecordError, match="phases is None, expected a value"):
        parse_record(json.dumps({key: item for key, item in value.items() if key != "phases"}))
    with pytest.raises(RecordError, match="surprise is 1, expected no such field"):
        parse_record(json.dumps({**value, "surprise": 1}))
    with pytest.raises(RecordError, match="a JSON object"):
        parse_record("[]")
    with pytest.raises(RecordError, match="NaN is not a JSON number"):
        parse_record('{"a": NaN}')


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(RecordError, match=r"record.json cannot be read \(No such file"):
        load_record(tmp_path / "record.json")
    (tmp_path / "record.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match="not UTF-8"):
        load_record(tmp_path / "record.json")
    (tmp_path / "record.json").write_text('{"run_id": "x"')
    with pytest.raises(RecordError, match=r"record.json: run record: not readable as JSON"):
        load_record(tmp_path / "record.json")


def test_on_a_gpu_the_record_names_it_and_the_peak_of_every_phase(project, monkeypatch):
    """With a stand-in for torch: the peak is that of the whole run, though each phase starts counting anew."""
    from types import SimpleNamespace

    peak = {"bytes": 700}
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        synchronize=lambda: None,
        max_memory_allocated=lambda: peak["bytes"],
        reset_peak_memory_stats=lambda: peak.update(bytes=0),
        current_device=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(name="a GPU", total_memory=10**9),
    )
    torch = SimpleNamespace(
        cuda=cuda, version=SimpleNamespace(cuda="13.0"), device=lambda text: SimpleNamespace(index=0)
    )
    monkeypatch.setattr("grass_lib.report.environment.loaded_torch", lambda: torch)
    run = begin()
    with run.phase("train"):
        peak["bytes"] = 500
    with run.phase("attribute"):
        peak["bytes"] = 300
    finished(run)
    record = load_record(project.runs / "toy-1" / "record.json")
    assert record.phase_peak_bytes == {"train": 500, "attribute": 300}
    assert record.peak_bytes == 700
    assert (record.device["type"], record.device["name"], record.device["cuda"]) == ("cuda", "a GPU", "13.0")


def test_seconds_of_each_checkpoint_count_with_their_median_and_an_interval():
    assert seconds_fields([9.0, 2.0, 2.0, 2.0, 2.0])["projection_seconds"] == 10.0
    fields = seconds_fields([1.0, 2.0, 3.0])
    low, high = fields["projection_seconds_interval"]
    assert fields["projection_seconds"] == 6.0
    assert 3.0 <= low < 6.0 < high <= 9.0
    assert seconds_fields([1.0, 2.0, 3.0]) == fields
    assert seconds_fields([2.5]) == {"projection_seconds": 2.5}
    assert seconds_fields(1.5) == {"projection_seconds": 1.5}
    assert seconds_fields(None) == {"projection_seconds": None}
    assert seconds_fields([2.0] * 4)["projection_seconds_interval"] == [8.0, 8.0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", {"gradients": -1.0}),
        ("seconds", 3.0),
        ("k_total", -1),
        ("layers", 1.5),
        ("head_included", 1),
        ("tokens_per_second", "fast"),
        ("stored_bytes", 0.5),
    ],
)
def test_fields_of_influence_rows_are_checked_where_they_are(project, field, value):
    run = begin()
    good = {
        "seconds": {"gradients": 1.0, "scoring": 0.0},
        "k_total": 12_288,
        "layers": 48,
        "head_included": False,
        "tokens_per_second": 10.0,
        "stored_bytes": 5,
    }
    spec = {"attributor": "influence_efim", "spec": "random_mask-32*32->sjlt-256", "damping": 0.1}
    row = run.result(**spec, **good)
    assert (row["k"], row["operator"], row["sparsification"]) == (256, "sjlt", "random_mask-32*32")
    with pytest.raises(RecordError, match=field):
        run.result(**spec, **{**good, field: value})
