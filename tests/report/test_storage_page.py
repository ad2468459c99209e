"""The page of a billion tokens: arithmetic without any measurement, hours from rates, tables from the benchmark."""

import json
import re
from pathlib import Path

import pytest

from grass_lib.errors import RecordError
from grass_lib.report import storage

ROOT = Path(__file__).parents[2]
SPEC = "random_mask-128*128->sjlt-4096"


def rates(block=1024, spec=SPEC, speed=16000.0, name="llama-3.1-8b"):
    row = {"step": "caching", "spec": spec, "layers": 225, "hessian": "Identity", "batch": 4}
    row |= {"tokens_per_second": speed, "stored": {"k": 225 * 4096}}
    return {
        **{"device": "a GPU", "date": "2026-01-01", "block": block, "spec": spec, "rows": [row]},
        "model": {"name": name, "operations_per_token": 3.1e10},
        "product_operations_per_second": 8e14,
    }


def formats():
    def row(dtype, rank, seed, damping, scores, size):
        found = {"dtype": dtype, "rank": rank, "seed": seed, "damping": damping, "bytes_per_sample": size}
        return found | {"scores": scores, "scores_lowest": scores - 0.1, "self_influence": 0.75, "same_top10": 0.5}

    rows = [row("float32", None, seed, damping, 1.0, 4000) for seed in (0, 1) for damping in (0.1, 0.01)]
    rows += [row("int8", None, 0, 0.1, 0.9, 1000), row("int8", None, 1, 0.1, 0.8, 1000)]
    rows += [row("int8", 16, 0, 0.01, 0.25, 17)]
    return {
        **{"command": "python x", "date": "2026-01-01", "versions": {"torch": "2"}, "model": "a model", "samples": 100},
        **{"queries": 7, "layers": {"a": 500, "b": 500}, "sparsification": "s", "projection": "p", "seeds": [0, 1]},
        "rows": rows,
    }


def test_without_measurements_disk_is_still_computed(tmp_path):
    written = {path.stem: path.read_text() for path in storage.write_plan_parts(tmp_path, tmp_path / "generated")}
    assert written["plan_formats"].startswith("Not measured yet: `python benchmarks/store_formats.py`")
    assert written["plan_hours"].startswith("Not measured yet: `grass bench throughput")
    passages = 10**9 // 1024
    for bytes_of, name in ((4096 * 4, "float32"), (4096 * 2, "bfloat16"), (4096 + 64, "int8"), (4096 + 64, "fp8")):
        small, large = (passages * layers * bytes_of / 1e12 for layers in (225, 561))
        line = next(line for line in written["plan_disk"].splitlines() if line.startswith(f"| {name} "))
        assert f"| {small:.2f} TB |" in line
        assert f"| {large:.2f} TB |" in line
    line = next(line for line in written["plan_disk"].splitlines() if line.startswith("| rank 1024, bfloat16"))
    assert f"| {(passages * 225 * 2048 + 225 * 4096 * 1024 * 4) / 1e12:.2f} TB |" in line
    page = (ROOT / "book" / "plan.md").read_text()
    assert set(re.findall(r"_generated/(\w+)\.md", page)) == set(written)
    assert "file: book/plan\n" in (ROOT / "_toc.yml").read_text()


def test_hours_follow_from_the_measured_rate(tmp_path):
    text = storage.hours_text(rates())
    assert f"caches 16,000 tokens/s, which is {16000 * 3.1e10 / 1e12:.0f} TFLOP/s, 62% of" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| llama")]
    assert [line[0].strip("| ") for line in lines] == ["llama-3.1-8b", "llama-3.1-70b"]
    assert lines[0][1:3] == ["17", "1"]
    assert lines[1][1].endswith("(estimate)")
    assert int(lines[1][1].split()[0]) / (1e9 / 16000 / 3600) == pytest.approx(70 / 7.5, rel=0.1)
    passages, seconds = 10**9 // 1024, 1e9 / 16000
    assert lines[0][3] == f"{passages * 225 * 8192 / seconds / 1e6:,.0f}"
    assert lines[0][4].strip(" |") == f"{passages * 225 * 4160 / seconds / 1e6:,.0f}"
    assert "Not computed" in storage.hours_text(rates(name="tiny"))
    (tmp_path / "throughput.json").write_text(json.dumps(rates(block=2048, spec="random_mask-64*64->sjlt-2048")))
    storage.write_plan_parts(tmp_path, tmp_path / "generated")
    assert "2,048 tokens, so that a billion tokens are 488,281" in (tmp_path / "generated/plan_disk.md").read_text()
    assert "rank 512, bfloat16" in (tmp_path / "generated/plan_disk.md").read_text()


def test_tables_are_means_over_seeds_by_damping(tmp_path):
    (tmp_path / "store_formats.json").write_text(json.dumps(formats()))
    storage.write_plan_parts(tmp_path, tmp_path / "generated")
    text = (tmp_path / "generated/plan_formats.md").read_text()
    assert "a model, 100 training blocks, 7 queries, 2 layers of 500 features (`s`, `p`), 2 seeds" in text
    first, second = text.split("At a damping of 0.01:")
    assert "| int8 | 1,000 | 4.0 | 0.8500 | 0.7000 | 0.7500 | 50% |" in first
    assert "| int8 |" not in second
    assert "| rank 16, int8 | 17 | 235.3 | 0.2500 |" in second
    for wrong in ("{", "[]", '{"rows": []}'):
        (tmp_path / "store_formats.json").write_text(wrong)
        with pytest.raises(RecordError, match=r"store_formats\.json .*run `python benchmarks/store_formats\.py` again"):
            storage.load(tmp_path)


def test_the_committed_benchmark_can_be_shown():
    result = storage.load(ROOT / "book" / "measured")
    text = storage.formats_text(result)
    for name in ("bfloat16", "int8", "fp8"):
        assert f"| {name} |" in text
    best = {row["dtype"]: row["scores"] for row in result["rows"] if row["rank"] is None and row["damping"] == 0.1}
    assert best["int8"] > best["fp8"] > 0.99
