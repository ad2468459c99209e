"""The benchmark on a CPU with tiny cases: every field is filled, wrong results would show, goals are judged."""

import json
from pathlib import Path

import pytest
import torch

from grass_lib.bench import projections
from grass_lib.bench.cases import Case, cpu_cases, gpu_cases
from grass_lib.bench.goals import goals
from grass_lib.bench.results import write
from grass_lib.errors import UsageError


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case("shapes", f"{family}-64", "torch", 3, 700, 64) for family in ("sjlt", "blocksjlt", "fjlt", "grass")]
    monkeypatch.setattr(projections, "cpu_cases", lambda: [*cases, Case("shapes", "sjlt-64", "kernel", 3, 700, 64)])
    monkeypatch.setattr(projections, "_ROTATION_BYTES", 1000)


@pytest.mark.usefixtures("tiny")
def test_lines_are_checked_and_written(tmp_path: Path) -> None:
    result = projections.run("cpu")
    *measured, refused = result["lines"]
    for line in measured:
        assert line["relative_error"] < 1e-6
        assert line["ms"] > 0
        assert line["repeats"] == 20
    assert refused["ms"] is None
    assert "CUDA" in refused["note"]
    write(result, tmp_path / "a" / "b.json")
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == json.loads(json.dumps(result))
    assert projections.summary(result).count("\n") == len(result["lines"])


@pytest.mark.usefixtures("tiny")
def test_a_wrong_result_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    build = projections.build_projector

    def wrong(spec: str, p: int, *, dtype: torch.dtype, **more: object) -> object:
        right = build(spec, p, dtype=dtype, **more)
        return right if dtype == torch.float64 else lambda x: right(x) * 1.01

    monkeypatch.setattr(projections, "build_projector", wrong)
    assert projections.run("cpu")["lines"][0]["relative_error"] == pytest.approx(0.01, rel=1e-3)


def test_fewer_than_twenty_repeats_are_refused() -> None:
    with pytest.raises(UsageError, match="20"):
        projections.run("cpu", repeats=3)


def test_cases_cover_what_is_promised() -> None:
    cases = gpu_cases()
    shapes = {(case.batch, case.p, case.k) for case in cases if case.part == "shapes"}
    assert {(64, 4_800_000, 4096), (512, 109_386, 1024), (64, 13_300_000, 2048), (256, 16_384, 4096)} <= shapes
    assert {case.k for case in cases if case.part == "k"} >= {256, 65536}
    assert {case.density for case in cases if case.part == "density"} >= {0.001, 1.0}
    assert all(case.backend == "torch" for case in cpu_cases())
    assert all(case.k % 512 == 0 for case in cases if case.backend == "fast_jl")


def test_goals_judge_both_ways() -> None:
    def line(spec: str, backend: str, ms: float) -> dict[str, object]:
        case = {"part": "shapes", "spec": spec, "backend": backend, "batch": 64, "p": 4_800_000}
        return {"case": case, "ms": ms}

    lines = [
        line("sjlt-4096", "kernel", 0.8),
        line("fjlt-4096", "kernel", 1.0),
        line("rademacher-4096", "kernel", 15.0),
        line("rademacher-4096", "fast_jl", 20.0),
    ]
    sweep = [{"p": 1_000_000, "build_and_project_ms": 2.0}, {"p": 100_000_000, "build_and_project_ms": 2.2}]
    judged = {row["goal"].split(",")[0]: row for row in goals({"lines": lines, "grass_sweep": sweep})}
    assert not judged["SJLT"]["met"]
    assert judged["fast JL transform"]["met"]
    assert judged["fast JL transform"]["measured"] == pytest.approx(20.0)
    assert judged["dense Rademacher"]["met"]
    assert judged["GraSS with 32"]["met"]
