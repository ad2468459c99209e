"""`grass bench systems` at its smallest, and the figure that the ledger takes from it."""

import json
import sys

import pytest

from grass_lib.bench import systems
from grass_lib.bench.results import write
from grass_lib.bench.systems import run, summary, throughput_percent_faster
from grass_lib.bench.systems_plan import SETTINGS, options_for
from grass_lib.errors import UsageError


@pytest.mark.system
def test_the_smallest_shape(tmp_path):
    result = run("tiny", device="cpu", systems="grass_lib", python=sys.executable)
    write(result, tmp_path / "systems.json")
    found = json.loads((tmp_path / "systems.json").read_text())
    assert [row["error"] for row in found["rows"]] == [""] * 2
    assert all(row["tokens_per_second"] > 0 and row["stored_bytes"] > 0 for row in found["rows"])
    assert "faster" not in summary(found)  # nothing to compare with
    assert "FactGraSS-16" in summary(found)


def test_a_system_that_fails_leaves_its_error(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such library; exit 1\n")
    python.chmod(0o755)
    result = run("tiny", device="cpu", systems="logix", python=python)
    assert all("no such library" in row["error"] for row in result["rows"])
    assert "exit code 1" in summary(result)


def test_another_size_is_that_of_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "_measure", lambda name, workload, options, *more: {
        "system": name, "label": options.label, "options": options.to_json(), "repeat": more[-1], "error": "none here",
    })  # fmt: skip
    result = run("tiny", device="cpu", k=64, python=sys.executable)
    assert result["planned"] == [
        "grass_lib LoGra-64, eFIM", "grass_lib FactGraSS-64, eFIM", "LogIX random-8, none", "LogIX random-8, raw",
        "dattri LoGra-64, eFIM", "dattri FactGraSS-64, eFIM", "bergson rademacher-8*8, autocorrelation",
    ]  # fmt: skip
    assert (result["k"], result["command"]) == (64, "grass bench systems --shape tiny --k 64")
    assert (systems.file_stem("tiny", 64), systems.file_stem("tiny")) == ("systems-tiny-64", "systems-tiny")
    for wrong in (10, -3):
        with pytest.raises(UsageError, match=f"k is {wrong}; expected squares"):
            run("tiny", device="cpu", k=wrong, python=sys.executable)


def test_a_run_that_was_cut_off_goes_on_with_the_rows_that_it_lacks(tmp_path, monkeypatch):
    out, asked, fails = tmp_path / "systems.json", [], [True]

    def measured(name, workload, options, *more):
        asked.append(options.label)
        number = len(asked)
        row = {"system": name, "label": options.label, "options": options.to_json(), "repeat": more[-1]}
        return row | {"error": "killed" if number == 2 and fails else "", "tokens_per_second_ready": float(number)}

    monkeypatch.setattr(systems, "_measure", measured)
    first = run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out)
    # The row of the claim is measured first, and stands in its place all the same.
    assert [row["error"] for row in first["rows"]] == ["killed", ""]
    again = run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out)
    assert asked == [first["planned"][1], first["planned"][0], first["planned"][0]]
    assert [row["tokens_per_second_ready"] for row in again["rows"]] == [3.0, 1.0]
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(again["rows"]))
    # What was whole is measured anew, and a run that is cut off keeps the rows behind the one that it lacks.
    run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out)
    assert len(asked) == 5
    whole = json.loads(out.read_text())
    whole["rows"][0]["error"] = "killed"
    out.write_text(json.dumps(whole))
    run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out)
    assert asked[5:] == [first["planned"][0]]
    assert [row["tokens_per_second_ready"] for row in json.loads(out.read_text())["rows"]] == [6.0, 4.0]
    asked.clear()
    fails.clear()
    # Timings of another machine are no part of this run, and neither are those of other work.
    monkeypatch.setattr(systems, "machine_id", lambda: "another")
    run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out)
    assert len(asked) == 2
    run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out, tokens=1024)
    assert len(asked) == 4
    out.write_text("no JSON")
    run("tiny", device="cpu", systems="grass_lib", python=sys.executable, out=out)
    assert len(asked) == 6


def test_the_paper_s_protocol():
    llama = SETTINGS["llama"]
    assert (llama.tokens, llama.batch_size, llama.length, llama.warm_up) == (1_000_000, 4, 1024, 10)
    assert [options.rank for options in options_for(llama, "cuda")["logix"]] == [64, 64]


def test_percent_faster():
    def row(system, speed, **options):
        return {"system": system, "options": options, "tokens_per_second_ready": speed}

    rows = [
        row("grass_lib", 300.0, spec="random_mask-8*8->sjlt-16", hessian="eFIM"),
        row("grass_lib", 900.0, spec="random_mask-8*8->sjlt-16", hessian="Identity"),
        row("grass_lib", 800.0, spec="normal-4*4", hessian="eFIM"),
        row("logix", 100.0, hessian="raw"),
        row("logix", 120.0, hessian="raw"),
        row("logix", 500.0, hessian="none"),
    ]
    assert throughput_percent_faster(rows) == pytest.approx(150.0)
    assert throughput_percent_faster(rows[:3]) is None


def test_wrong_use_is_named():
    with pytest.raises(UsageError, match="tiny, gpt2, llama"):
        run("bert")
    with pytest.raises(UsageError, match="takes part"):
        run("llama", systems="dattri", python=sys.executable)
