import json
import shlex

import pytest

from grass_lib.report.claims import FIELDS
from grass_lib.report.generated import lds_ledger, seconds_ledger
from grass_lib.report.ledger import METRIC_TITLES, ledger_rows
from grass_lib.report.published import published_rows
from grass_lib.report.schema import RunRecord


@pytest.fixture(autouse=True)
def registry(monkeypatch, tmp_path):
    monkeypatch.setattr("grass_lib.report.claims.project_root", lambda: tmp_path)  # without committed benchmarks
    monkeypatch.setattr("grass_lib.experiments.EXPERIMENTS", {"mlp_mnist": None}, raising=False)


def result(projection, mean=0.4, interval=(0.39, 0.41), *, sparsification="identity", **more):
    family, _, k = projection.partition("-")
    return {
        "attributor": "trak",
        "sparsification": sparsification,
        "projection": projection,
        "spec": projection,
        "k": int(k),
        "lds": {"mean": mean, "interval": list(interval), "n_models": 50, "n_queries": 450, "n_undefined": 0},
        "noise_ceiling": None,
        "damping": 0.1,
        "damping_convention": "relative",
        "projection_seconds": 2.0,
        "backend": "torch",
        "operator": family,
        **more,
    }


def record(*rows, scale="paper", kind="official", run_id="run-1", experiment="mlp_mnist", **extra):
    return RunRecord(
        run_id=run_id,
        experiment=experiment,
        scale=scale,
        data={"source": "x", "rows": 1, "sha256": "0" * 64, "kind": kind},
        parameters={},
        results=list(rows),
        phases={},
        peak_bytes=1,
        stored_bytes=0,
        tokens_per_second=None,
        device={"type": "cuda", "name": "a GPU"},
        versions={"python": "3.11"},
        source_hash="0" * 64,
        modules={},
        git_commit=None,
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:01:00+00:00",
        extra=extra,
    )


def find(rows, projection, metric="lds", sparsification="identity", experiment="mlp_mnist"):
    (row,) = [
        row
        for row in rows
        if (row["experiment"], row["sparsification"], row["projection"], row["metric"])
        == (experiment, sparsification, projection, metric)
    ]
    return row


def published(projection, metric="lds"):
    return next(row[metric] for row in published_rows("mlp_mnist") if row["projection"] == projection)


def test_every_published_figure_has_one_row_and_the_claim_has_one():
    rows = ledger_rows([])
    assert len(rows) == 111 * 2 + 1
    assert {row["metric"] for row in rows[:-1]} == {"lds", "projection_seconds"}
    assert all(tuple(row) == FIELDS for row in rows)
    assert all(row["verdict"] == "not run" and row["measured"] is None and row["reason"] for row in rows)
    assert [row["published"] for row in rows[:-1:2]] == [row["lds"] for row in published_rows()]
    assert [row["published"] for row in rows[1:-1:2]] == [row["projection_seconds"] for row in published_rows()]
    claim = rows[-1]
    assert (claim["experiment"], claim["published"]) == ("llama3_openwebtext", 165.0)
    assert "165 %" in claim["reason"]
    assert find(rows, "identity", sparsification="random_mask-16*16", experiment="gpt2_wikitext")["k"] == 256
    json.dumps(rows, allow_nan=False)


def test_not_run_says_what_to_do():
    rows = ledger_rows([record(result("sjlt-2048"))])
    assert "grass run mlp_mnist --scale paper" in find(ledger_rows([]), "sjlt-2048")["reason"]
    assert "--projection 'normal-4096'" in find(rows, "normal-4096")["reason"]
    assert "--projection 'rademacher-4096'" in find(rows, "fjlt-4096")["reason"]
    assert "mask that is fitted" in find(rows, "selective_mask-4096")["reason"]
    other = find(rows, "sjlt-2048", experiment="resnet9_cifar2")
    assert other["reason"] == "this version has no notebook for the pair"


@pytest.mark.parametrize(
    ("difference", "half", "verdict"),
    [
        (0.0, 0.01, "reproduced"),
        (0.02, 0.001, "reproduced"),
        (-0.02, 0.001, "reproduced"),
        (0.0201, 0.001, "differs"),
        (-0.0201, 0.02, "differs"),
        (0.03, 0.03, "reproduced"),
        (-0.0301, 0.03, "differs"),
    ],
)
def test_verdict_is_the_larger_of_the_tolerance_and_half_the_interval(difference, half, verdict):
    mean = published("sjlt-4096") + difference
    row = find(ledger_rows([record(result("sjlt-4096", mean, (mean - half, mean + half)))]), "sjlt-4096")
    assert row["verdict"] == verdict
    assert row["measured"] == mean
    assert row["interval"] == [mean - half, mean + half]
    assert (row["run_id"], row["data"], row["operator"]) == ("run-1", "official", "sjlt")
    assert f"{abs(difference):.4f}" in row["reason"]
    assert "damping 0.1 relative" in row["reason"]


def test_embedded_runs_never_fill_a_row():
    rows = ledger_rows([record(result("sjlt-4096"), scale="embedded", kind="embedded")])
    assert all(row["measured"] is None for row in rows)


@pytest.mark.parametrize(("kind", "extra"), [("substitute", {}), ("official", {"weights": "substitute"})])
def test_substitutes_are_not_comparable(kind, extra):
    mean = published("sjlt-4096")
    row = find(ledger_rows([record(result("sjlt-4096", mean), kind=kind, **extra)]), "sjlt-4096")
    assert row["verdict"] == "not comparable"
    assert "substitute" in row["reason"]
    assert row["measured"] == mean


def test_seconds_are_compared_as_ratios_within_the_run():
    rows = ledger_rows([record(result("sjlt-4096"), result("normal-4096", projection_seconds=6.0))])
    row = find(rows, "normal-4096", "projection_seconds")
    assert (row["verdict"], row["measured"], row["interval"]) == ("not comparable", 6.0, None)
    theirs = published("normal-4096", "projection_seconds") / published("sjlt-4096", "projection_seconds")
    assert f"3.00 times sjlt-4096 here, {theirs:.2f} times as published" in row["reason"]


def test_ratios_never_leave_a_run():
    selective = result("selective_mask-4096", way="learned", shared=True, seed=0)
    study = record(selective, experiment="mlp_masks", run_id="study")
    rows = ledger_rows([record(result("sjlt-4096"), result("normal-4096", projection_seconds=6.0)), study])
    assert find(rows, "selective_mask-4096", "projection_seconds")["reason"].endswith("(a GPU here)")
    table = seconds_ledger(rows)
    ratio = {row["Compression"]: row["Ratio, measured"] for _, row in table.iterrows() if row["Pair"] == "MLP + MNIST"}
    assert (ratio["normal-4096"], ratio["sjlt-4096"], ratio["selective_mask-4096"]) == (3.0, 1.0, "")


def factored(sparsification, projection="identity", mean=0.2, seconds=2.0, **more):
    row = result("x-256", mean, sparsification=sparsification, projection_seconds=seconds, **more)
    return {**row, "attributor": "influence_efim", "projection": projection, "spec": f"{sparsification}->{projection}"}


def gpt2(*rows, parameters=None, **options):
    run = record(*rows, experiment="gpt2_wikitext", **options)
    object.__setattr__(run, "parameters", parameters or {})
    return run


def test_factored_rows_meet_their_published_ones():
    rows = ledger_rows(
        [gpt2(factored("normal-16*16", mean=0.1188), factored("random_mask-32*32", "sjlt-256", 0.2, seconds=0.5))]
    )
    logra = find(rows, "identity", sparsification="normal-16*16", experiment="gpt2_wikitext")
    assert (logra["measured"], logra["verdict"], logra["k"], logra["operator"]) == (0.1188, "reproduced", 256, "x")
    assert "damping 0.1, published 0.0001, both relative to the mean eigenvalue" in logra["reason"]
    fact = find(rows, "sjlt-256", sparsification="random_mask-32*32", experiment="gpt2_wikitext")
    assert (fact["measured"], fact["verdict"]) == (0.2, "differs")
    time = find(rows, "sjlt-256", "projection_seconds", sparsification="random_mask-32*32", experiment="gpt2_wikitext")
    ratio = 6.579 / 20.4839
    assert f"0.25 times LoGra at k = 256 per layer here, {ratio:.2f} times as published" in time["reason"]


def test_reasons_name_the_data_and_the_base_that_a_run_chose():
    chosen = {"data": "validation+test", "base": "scratch"}
    substitute = gpt2(factored("normal-16*16"), parameters=chosen, kind="substitute", weights="substitute")
    rows = ledger_rows([substitute])
    row = find(rows, "identity", sparsification="normal-16*16", experiment="gpt2_wikitext")
    assert row["verdict"] == "not comparable"
    assert "substitute data (data=validation+test, base=scratch)" in row["reason"]


def test_missing_factored_rows_say_which_command_makes_them(monkeypatch):
    from grass_lib.runner.planning import compression_parameters

    monkeypatch.setattr("grass_lib.experiments.EXPERIMENTS", {"gpt2_wikitext": None}, raising=False)
    chosen = {"data": "validation+test", "base": "scratch"}
    rows = ledger_rows([gpt2(factored("normal-16*16"), parameters=chosen)])
    mask = find(rows, "sjlt-256", sparsification="random_mask-32*32", experiment="gpt2_wikitext")
    assert "(data=validation+test, base=scratch) has no such row" in mask["reason"]
    command = shlex.split(mask["reason"].split("`")[1])
    assert command[:5] == ["grass", "run", "gpt2_wikitext", "--scale", "paper"]
    options = dict(zip(command[5::2], command[6::2], strict=True))
    specs = compression_parameters([options["--sparsification"]], [options["--projection"]])
    assert specs == {"specs": "random_mask-32*32->sjlt-256"}
    selective = find(rows, "identity", sparsification="selective_mask-16*16", experiment="gpt2_wikitext")
    assert selective["verdict"] == "not run"
    assert "mask that is fitted" in selective["reason"]
    nothing = find(ledger_rows([]), "identity", sparsification="normal-16*16", experiment="gpt2_wikitext")
    assert "`grass run gpt2_wikitext --scale paper`" in nothing["reason"]


def test_rows_of_the_study_of_masks_stand_for_the_pair():
    """Those of one learned mask for all networks, as in the published runs; of several seeds the first."""

    def of(way, shared, seed, mean):
        return result("selective_mask-4096", mean, way=way, shared=shared, seed=seed)

    run = record(
        *(of("random", True, 0, 0.1), of("learned", False, 0, 0.2), of("learned", True, 0, 0.41)),
        *(of("learned", True, 1, 0.5), of("energy", True, 0, 0.6)),
        experiment="mlp_masks",
    )
    row = find(ledger_rows([run]), "selective_mask-4096")
    assert (row["measured"], row["verdict"]) == (0.41, "reproduced")
    assert "one mask for all networks" in row["reason"]
    assert "the first of 2 seeds (0.4100 to 0.5000)" in row["reason"]
    missing = find(ledger_rows([run]), "selective_mask-2048")
    assert "`grass run mlp_masks --scale paper`" in missing["reason"]
    assert find(ledger_rows([run]), "sjlt-4096")["verdict"] == "not run"


def test_selective_masks_of_layers_say_how_they_were_chosen():
    run = gpt2(factored("selective_mask-16*16", mean=0.2, masks="energy"))
    row = find(ledger_rows([run]), "identity", sparsification="selective_mask-16*16", experiment="gpt2_wikitext")
    assert row["measured"] == 0.2
    assert "masks of the kind 'energy', at the trained model" in row["reason"]


def test_reasons_stay_closed():
    rows = ledger_rows([record(result("sjlt-4096", 0.9))])
    reasons = list(lds_ledger(rows)["Reason"])
    assert all(text.startswith("<details><summary>why</summary>") for text in reasons)


def test_metrics_have_words():
    assert {row["metric"] for row in ledger_rows([])} == set(METRIC_TITLES)
    assert not any("_" in title for title in METRIC_TITLES.values())


def test_published_fjlt_is_set_beside_rademacher_and_our_fjlt_is_mentioned():
    mean = published("fjlt-4096")
    rows = ledger_rows([record(result("rademacher-4096", mean), result("fjlt-4096", 0.1234))])
    row = find(rows, "fjlt-4096")
    assert (row["measured"], row["operator"], row["verdict"]) == (mean, "rademacher", "reproduced")
    assert "dense Rademacher" in row["reason"]
    assert "our blocked fjlt, another operator: 0.1234" in row["reason"]
    alone = find(ledger_rows([record(result("fjlt-4096", mean))]), "fjlt-4096")
    assert alone["measured"] is None, "another operator never fills the row"
    assert "0.43" in alone["reason"]


def test_first_record_wins_and_others_fill_what_it_lacks():
    first = record(result("sjlt-2048", 0.41), run_id="first")
    second = record(result("sjlt-2048", 0.2), result("sjlt-4096", 0.42), run_id="second")
    rows = ledger_rows([first, second])
    assert (find(rows, "sjlt-2048")["run_id"], find(rows, "sjlt-4096")["run_id"]) == ("first", "second")


def test_the_papers_damping_convention_is_preferred():
    relative = result("sjlt-2048", 0.1)
    paper = result("sjlt-2048", published("sjlt-2048"), damping_convention="paper")
    row = find(ledger_rows([record(relative, paper)]), "sjlt-2048")
    assert row["verdict"] == "reproduced"
    assert "damping 0.1, published 0.1" in row["reason"]


def test_a_run_of_another_protocol_is_not_comparable():
    exact = result("sjlt-2048", published("sjlt-2048"))
    small = record(exact)
    object.__setattr__(small, "parameters", {**small.parameters, "n_lds_models": 3})
    row = find(ledger_rows([small]), "sjlt-2048")
    assert row["verdict"] == "not comparable"
    assert "n_lds_models=3" in row["reason"]
    same = record(exact)
    object.__setattr__(same, "parameters", {**same.parameters, "n_lds_models": 0, "n_trak_models": 0})
    assert find(ledger_rows([same]), "sjlt-2048")["verdict"] == "reproduced"


def test_masked_projections_are_rows_of_their_own():
    masked = result("sjlt-2048", 0.9, sparsification="random_mask-32768")
    rows = ledger_rows([record(masked, experiment="resnet9_cifar2")])
    assert find(rows, "sjlt-2048", experiment="resnet9_cifar2")["measured"] is None
    hit = find(rows, "sjlt-2048", sparsification="random_mask-32768", experiment="resnet9_cifar2")
    assert hit["measured"] == 0.9
    assert hit["verdict"] == "differs"


@pytest.mark.parametrize(
    ("measured", "extra", "verdict"),
    [(170, {}, "reproduced"), (90, {}, "differs"), (170, {"weights": "substitute"}, "not comparable")],
)
def test_claim(measured, extra, verdict):
    run = record(experiment="llama3_openwebtext", throughput_percent_faster=measured, **extra)
    row = ledger_rows([run])[-1]
    assert (row["measured"], row["verdict"]) == (measured, verdict)


def test_a_damping_at_the_edge_of_its_grid_is_told():
    inside = find(ledger_rows([record(result("sjlt-4096"))]), "sjlt-4096")
    edge = find(ledger_rows([record(result("sjlt-4096", damping_at_edge=True))]), "sjlt-4096")
    assert "damping 0.1 relative" in inside["reason"]
    assert "damping 0.1 (edge of the grid) relative" in edge["reason"]


def test_rows_with_the_output_layer_are_not_beside_published_ones_without_it():
    def measured(head, run_id):
        row = result("sjlt-256", sparsification="random_mask-32*32", head_included=head, attributor="influence_efim")
        return record(row, experiment="gpt2_wikitext", run_id=run_id)

    both = ledger_rows([measured(True, "with"), measured(False, "without")])
    row = find(both, "sjlt-256", sparsification="random_mask-32*32", experiment="gpt2_wikitext")
    assert row["run_id"] == "without"
    alone = ledger_rows([measured(True, "with")])
    assert find(alone, "sjlt-256", sparsification="random_mask-32*32", experiment="gpt2_wikitext")["run_id"] is None
