"""Tables, figures and pages of the comparison with other systems, and the claim's row of the ledger."""

import dataclasses
import json

import pytest
import torch

from grass_lib.baselines import BergsonOptions, DattriOptions, KronfluenceOptions, LogIXOptions, OursOptions, Outcome
from grass_lib.errors import RecordError
from grass_lib.report import claims, systems
from grass_lib.report.claims import FIELDS, THROUGHPUT
from grass_lib.report.figures import draw_record
from grass_lib.report.ledger import ledger_rows
from grass_lib.report.schema import RunRecord, check_row
from grass_lib.report.systems_bench import SHAPES, load_systems, systems_markdown, write_systems_parts
from grass_lib.report.systems_lds import systems_lds_markdown
from grass_lib.report.tables import table_html


def outcome(system="logix", **seconds):
    return Outcome(
        system, system, torch.zeros(1, 2, 3), (0.1,), seconds, {"gradients": 7_000, "scoring": 9_000}, 40, "1.0",
        details={"layers": 8},
    )  # fmt: skip


def bench(**more):
    row = {
        "system": "grass_lib", "label": "grass_lib FactGraSS-16, eFIM", "version": "0.1.0", "error": "", "options": {},
        "tokens_per_second": 10.0, "tokens_per_second_ready": 8.0, "peak_bytes": 2_000_000_000,
        "stored_bytes": 5_000_000,
    }  # fmt: skip
    failed = {
        "system": "logix",
        "label": "LogIX random-4, raw",
        "version": "",
        "error": "the worker\nRuntimeError: a|b",
    }
    return {
        "command": "grass bench systems --shape llama", "device": "a GPU", "device_type": "cuda", "date": "2026-01-02",
        "tokens": 512, "length": 32, "batch_size": 4, "warm_up": 1, "model": {"dtype": "bfloat16"},
        "versions": {"torch": "2.13.0"},
        "rows": [row, failed], **more,
    }  # fmt: skip


def test_costs_are_fields_of_a_result_row():
    found = systems.costs(outcome(gradients=2.0, curvature=2.0, scoring=3.0), 8)
    assert (found["tokens_per_second"], found["tokens_per_second_ready"]) == (4.0, 2.0)
    assert found["system_peak_bytes"] == 7_000  # of caching, not of scoring
    assert found["scoring_seconds"] == 3.0
    assert systems.costs(outcome(curvature=2.0), 8)["tokens_per_second"] is None
    row = {
        **found, "attributor": "logix", "sparsification": "identity", "projection": "identity", "spec": "identity",
        "k": None, "lds": None, "noise_ceiling": None, "damping": 0.1, "damping_convention": "relative",
        "projection_seconds": None, "backend": None, "operator": None,
    }  # fmt: skip
    check_row(row)
    table_html(systems.cost_table([row]), "dt-cost")
    assert systems.throughput_figure([row]).axes


@pytest.mark.parametrize(
    ("options", "spec", "attributor"),
    [
        (OursOptions(spec="normal-4*4->identity"), "normal-4*4->identity", "influence_efim"),
        (LogIXOptions(rank=8), "normal-8*8->identity", "logix"),
        (DattriOptions(method="factgrass", k=16), "random_mask-8*8->sjlt-16", "dattri"),
        (BergsonOptions(side=4), "rademacher-4*4->identity", "bergson"),
        (KronfluenceOptions(), "identity", "kronfluence"),
    ],
)
def test_options_in_the_terms_of_a_result_row(options, spec, attributor):
    assert systems.described(options) == (spec, attributor)


def test_checks_facts_and_correlations():
    check = {"theirs": "a", "ours": "b", "spearman": 1.0, "largest_difference": 1e-7, "same": True, "rest": "rounding"}
    assert "| a | b | 1.000000 | 1.0e-07 | yes | rounding |" in systems.checks_text([check])
    fact = {"system": "LogIX", "what": "<b>", "expected": "x", "seen": "y", "why": "z"}
    assert "**LogIX**, &lt;b&gt;. One would expect: x. Seen: **y** (z)." in systems.facts_text([fact])
    assert systems.facts_text([fact | {"seen": "x"}]) == "\n"  # as expected
    assert len(systems.correlation_figure(["a", "b"], [[1.0, 0.5], [0.5, 1.0]]).axes) == 2


def test_the_page_shows_the_lds_of_every_system(tmp_path):
    def row(system, label, mean, k=16):
        found = {"mean": mean, "interval": [mean - 0.1, mean + 0.1], "n_models": 5, "n_queries": 7, "n_undefined": 0}
        ceiling = {"mean": 0.8, "interval": None}
        return {
            "system": system, "label": label, "k": k, "lds": found, "noise_ceiling": ceiling, "attributor": system,
            "sparsification": "identity", "projection": "identity", "spec": "identity", "damping": 0.1,
            "damping_convention": "relative", "projection_seconds": None, "backend": None, "operator": None,
        }  # fmt: skip

    rows = [
        row("grass_lib", "ours*low", 0.2), row("grass_lib", "ours high", 0.3), row("logix", "theirs", 0.4),
        row("kronfluence", "whole", 0.5, k=None),
    ]  # fmt: skip
    labels = [each["label"] for each in rows]
    matrix = torch.full((4, 4), 0.25)
    matrix[1, 2] = matrix[2, 1] = 0.625
    run = RunRecord(
        run_id="run-1", experiment="logix_comparison", scale="paper", parameters={}, results=rows, phases={},
        data={"source": "text, <unk>", "rows": 1, "sha256": "0" * 64, "kind": "substitute"}, peak_bytes=1,
        stored_bytes=0, tokens_per_second=None, device={"type": "cuda", "name": "a GPU"}, versions={},
        source_hash="0" * 64, modules={}, git_commit=None, started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:01:00+00:00",
        extra={
            "weights": "substitute", "system_versions": {"logix": "0.1.1"},
            "correlations": {"labels": labels, "matrix": matrix.tolist()}, "checks": [{"same": True}],
        },
    )  # fmt: skip
    text = systems_lds_markdown([run], tmp_path)
    assert (
        "run-1` on a GPU: GPT-2 small trained from scratch in place of the pretrained one, data text, &lt;unk&gt;; 5"
        in text
    )
    assert "ours high 0.300 (0.200 to 0.400); theirs 0.400 (0.300 to 0.500); whole 0.500" in text
    assert "ours low" not in text
    assert "LogIX 0.1.1." in text
    assert "correlate by 0.62 with each other. Given" in text  # the one that compresses nothing is not asked
    drawn = (tmp_path / "logix_comparison_lds.svg").read_text()
    assert all(f"<!-- {label}" in drawn for label in labels)
    assert (tmp_path / "logix_comparison_agreement.svg").is_file()
    without = dataclasses.replace(run, results=[{**each, "lds": None} for each in rows])
    assert systems_lds_markdown([without, run], tmp_path) == text
    assert "grass run logix_comparison" in systems_lds_markdown([without], tmp_path)
    assert [path.name for path in draw_record(without, tmp_path / "bare", ("svg",))] == [
        "logix_comparison_agreement.svg"
    ]
    run.extra["checks"].append({"same": False})
    run.extra["correlations"]["labels"][1] = "somebody else"
    assert "correlate" not in systems_lds_markdown([run], tmp_path)


def test_a_page_of_the_benchmark(tmp_path):
    measured, generated = tmp_path / "measured", tmp_path / "generated"
    measured.mkdir()
    generated.mkdir()
    write_systems_parts(measured, generated)
    assert all("Not measured yet" in (generated / f"systems_{shape}.md").read_text() for shape in SHAPES)
    (measured / "systems-llama.json").write_text(json.dumps(bench()))
    write_systems_parts(measured, generated)
    text = (generated / "systems_llama.md").read_text()
    assert "| grass_lib FactGraSS-16, eFIM | 10 | 8 | 2.00 | 0.005 |" in text
    assert "failed: RuntimeError: a/b" in text
    assert "{figure} /book/_generated/figures/systems_llama.svg" in text
    drawn = (generated / "figures" / "systems_llama.svg").read_text()
    assert [drawn.count(word) for word in ("grass_lib FactGraSS-16, eFIM", "8, 2.0 GB", "<!-- dattri")] == [1, 1, 0]
    assert "with curvature: grass_lib FactGraSS-16, eFIM. Least memory: grass_lib" in text
    assert "Not measured" not in text
    cut = systems_markdown(bench(planned=["grass_lib FactGraSS-16, eFIM", "dattri LoGra-16, eFIM"]))
    assert "Not measured, because the run was stopped before: dattri LoGra-16, eFIM." in cut
    assert "165 % faster" in systems_markdown(bench(throughput_percent_faster=165.2))
    assert "FactGraSS is 12 % slower than LogIX" in systems_markdown(bench(throughput_percent_faster=-12.2))
    (measured / "systems-gpt2.json").write_text(json.dumps(bench(k=64)))
    with pytest.raises(RecordError, match="k = 64, expected 4096"):
        load_systems(measured, "gpt2")
    (measured / "systems-gpt2.json").write_text("{}")
    with pytest.raises(RecordError, match="has no rows"):
        load_systems(measured, "gpt2")


@pytest.mark.parametrize("faster", [170.0, 90.0])
def test_the_claim_is_measured_by_the_benchmark(tmp_path, monkeypatch, faster):
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    folder = tmp_path / "book" / "measured"
    folder.mkdir(parents=True)
    (claim,) = [row for row in ledger_rows([]) if row["metric"] == THROUGHPUT]
    assert (claim["verdict"], claim["measured"]) == ("not run", None)
    assert "grass bench systems --shape llama" in claim["reason"]
    path = folder / "systems-llama.json"
    path.write_text(json.dumps(bench(**{THROUGHPUT: faster, "device_type": "cpu"})))
    assert [row["verdict"] for row in ledger_rows([]) if row["metric"] == THROUGHPUT] == ["not run"]
    path.write_text(json.dumps(bench(**{THROUGHPUT: faster})))
    (claim,) = [row for row in ledger_rows([]) if row["metric"] == THROUGHPUT]
    assert (claim["verdict"], claim["measured"]) == ("not comparable", faster)  # the weights are random
    assert set(claim) == set(FIELDS)
    assert "LogIX" in claim["reason"]


def test_earlier_runs_have_a_sentence_each(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    folder, generated = tmp_path / "book" / "measured", tmp_path / "generated"
    folder.mkdir(parents=True)
    (folder / "systems-llama.json").write_text(json.dumps(bench(**{THROUGHPUT: 119.0})))
    (folder / "systems-llama-16384.json").write_text(json.dumps(bench(**{THROUGHPUT: 3.0})))  # of another size
    for number, faster in ((2, 126.0), (10, 71.0)):
        (folder / f"systems-llama_{number}.json").write_text(json.dumps(bench(**{THROUGHPUT: faster})))
    write_systems_parts(folder, generated)
    page = (generated / "systems_llama.md").read_text()
    assert page.count("Earlier runs") == 1
    assert page.count("\n- a GPU, ") == 2
    assert page.index("FactGraSS 126 % faster") < page.index("FactGraSS 71 % faster")
    (claim,) = [row for row in ledger_rows([]) if row["metric"] == THROUGHPUT]
    assert claim["measured"] == 119.0
    assert "(126 % faster, 71 % faster in earlier runs on other machines)" in claim["reason"]
    (folder / "systems-llama_3.json").write_text(json.dumps(bench(k=16384)))
    with pytest.raises(RecordError, match="16384"):
        write_systems_parts(folder, generated)
