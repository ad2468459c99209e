"""The throughput benchmark on a CPU with a tiny model: every row is filled, wrong rows show, goals are judged."""

import json

import pytest
import torch
from tiny_llama import make_batch, make_llama

from grass_lib.bench import throughput_run
from grass_lib.bench.throughput_check import cosines, kept_positions, score_agreement
from grass_lib.bench.throughput_model import build
from grass_lib.bench.throughput_steps import arithmetic, bare_step, operations, plain_step, reference_step
from grass_lib.errors import DataError, GrassError, UsageError
from grass_lib.experiments.models.llama import SHAPES
from grass_lib.gradients import FactoredGradients, causal_loss, chunked_causal_loss
from grass_lib.report import fp8_scores, plan, throughput

SPEC = "random_mask-16*16->sjlt-64"
OPTIONS = {
    **{"model": "tiny", "dtype": "float32", "spec": SPEC, "other": "normal-4*4->identity", "batches": (2,)},
    **{"block": 8, "samples": 8, "steps": 1, "device": "cpu"},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    found = throughput_run.run(**OPTIONS, folder=folder / "stores", out=folder / "a" / "b.json")
    assert json.loads((folder / "a" / "b.json").read_text()) == json.loads(json.dumps(found))
    assert list((folder / "stores").iterdir()) == []
    return found


def test_every_row_is_measured_and_checked(result):
    steps = [(row["step"], row["layers"], row["hessian"], row["batch"]) for row in result["rows"]]
    assert len(steps) == 7
    assert {("caching", 28, "Identity", 2), ("caching", 29, "Identity", 2), ("plain", 0, "", 2)} <= set(steps)
    assert ("caching", 29, "eFIM", 2) in steps
    assert ("reference", 29, "", 2) in steps
    assert all(row["tokens_per_second"] > 0 and not row["note"] for row in result["rows"])
    written = [row["stored"] for row in result["rows"] if row["step"] == "caching"]
    assert all(each["rows"] == 8 and each["problems"] == [] for each in written)
    assert {each["k"] for each in written} >= {28 * 64, 29 * 64}
    # Rows are stored in bfloat16, of which eight bits are exact.
    assert 0.9999 < result["check"]["worst_cosine"] <= 1.0
    assert result["check"]["rows"] == 8
    assert 0.9999 < result["check"]["eager"]["worst_cosine"] <= 1.0
    assert abs(result["check"]["mean_kept_position"] - 0.5) < 0.05
    assert [goal["goal"].split()[0] for goal in result["goals"]] == ["worst"]
    assert throughput_run.summary(result).count("\n") >= 7


@pytest.fixture(scope="module")
def with_fp8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    return throughput_run.run(**OPTIONS, fp8=True, folder=folder / "stores", out=folder / "b.json"), folder


def test_rows_with_fp8_come_last_and_change_no_other(result, with_fp8):
    found, folder = with_fp8
    assert json.loads((folder / "b.json").read_text()) == json.loads(json.dumps(found))
    assert list((folder / "stores").iterdir()) == []
    assert [row["fp8"] for row in found["rows"]] == [False] * 7 + [True]
    row = found["rows"][-1]
    assert (row["step"], row["layers"], row["stored"]["rows"], row["note"]) == ("caching", 29, 8, "")
    assert row["stored"]["problems"] == []
    assert found["check"] == result["check"]
    assert result["fp8"] == {}
    # Rounding to three bits is seen, and is not an error.
    assert 0.8 < found["fp8"]["worst_cosine"] < 0.9999 < result["check"]["worst_cosine"]
    assert found["fp8"]["scored_rows"] == 8
    assert -1 <= found["fp8"]["worst_spearman"] <= found["fp8"]["mean_spearman"] <= 1
    assert [goal["goal"].split()[0] for goal in found["goals"]] == ["worst"]
    assert "caching fp8" in throughput_run.summary(found)


def test_what_fails_with_fp8_is_a_note_and_the_rest_is_kept(tmp_path, monkeypatch, result):
    from grass_lib.bench.throughput import Throughput

    whole = Throughput._caching

    def failing(self, *args, **options):
        if options.get("fp8"):
            (tmp_path / "stores" / "x-fp8").mkdir(parents=True)
            raise RuntimeError("no such kernel\nat line 5")
        return whole(self, *args, **options)

    monkeypatch.setattr(Throughput, "_caching", failing)
    found = throughput_run.run(**OPTIONS, fp8=True, folder=tmp_path / "stores", out=tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(found))
    assert found["rows"][-1]["note"] == "failed (not compiled): RuntimeError: no such kernel"
    assert found["rows"][-1]["tokens_per_second"] is None
    assert found["check"] == result["check"]
    assert len(found["rows"]) == 8
    assert found["goals"]
    assert list((tmp_path / "stores").iterdir()) == []
    assert "no such kernel" in throughput_run.summary(found)


def test_a_widened_model_goes_back_to_its_bits():
    found = build("tiny", dtype="bfloat16", device=torch.device("cpu"))
    before = {name: value.clone() for name, value in found._values()}
    assert {value.dtype for value in before.values()} == {torch.bfloat16, torch.float32}
    assert {value.dtype for value in found.widened().parameters()} == {torch.float32}
    found.narrowed()
    for name, value in found._values():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name


def test_agreement_of_scores():
    rows = {"a": torch.randn(9, 30), "b": torch.randn(9, 20)}
    assert score_agreement(rows, rows) == {"scored_rows": 9, "mean_spearman": 1.0, "worst_spearman": 1.0}
    # The product of a row with itself, the largest by far, does not count.
    scores = sum(part.double() @ part.double().T for part in rows.values())
    other = {"a": torch.randn(9, 30)}
    theirs = other["a"].double() @ other["a"].double().T
    wanted = []
    for row in range(9):
        kept = [place for place in range(9) if place != row]
        ranks = [values[row][kept].argsort().argsort().double() for values in (scores, theirs)]
        wanted.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    found = score_agreement(rows, other)
    assert found["mean_spearman"] == pytest.approx(sum(wanted) / 9)
    assert found["worst_spearman"] == pytest.approx(min(wanted))
    assert score_agreement({"a": torch.zeros(4, 2)}, {"a": torch.zeros(4, 2)})["mean_spearman"] is None


def test_operations_of_a_token():
    model = make_llama()
    weights = 4 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24) + 37 * 16
    assert arithmetic(model, 10) == 4 * weights + 4 * 2 * 10 * 16 * 3.5
    full = SHAPES["llama-3.1-8b"]
    assert operations(full.linear_weights, 32, 4096, 1024) == pytest.approx(3.1e10, rel=0.02)


def test_the_reference_step_computes_the_same_rows_up_to_its_scale():
    model, batch = make_llama(), make_batch(4)
    batch = {**batch, "labels": batch["input_ids"]}  # without padding, where its loss means the same
    gradients = FactoredGradients(
        model, causal_loss, include_head=True, sparsification="random_mask-6*5", projection="sjlt-11"
    )
    before = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}
    wanted, _ = gradients(batch)
    with reference_step(model, gradients) as step:
        found = step(batch)
    # Per-sample gradients of a mean over tokens, times the batch.
    scales = {name: gradients.sides(name)[0].scale * gradients.sides(name)[1].scale for name in wanted}
    for name, rows in wanted.items():
        ours = rows / scales[name] / (batch["input_ids"].shape[1] - 1)
        assert (found[name] - ours).norm() < 1e-4 * ours.norm(), name
    assert {name: (id(value), value.requires_grad) for name, value in model.named_parameters()} == before
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_plain_and_bare_steps_give_the_embeddings_gradient():
    model, batch = make_llama(), make_batch(3)
    with plain_step(model) as plain, bare_step(model) as bare:
        torch.testing.assert_close(bare(batch), plain(batch), rtol=1e-4, atol=1e-5)


def test_cosines_name_the_worst_layer():
    exact = {"a": torch.randn(3, 5), "b": torch.randn(3, 5), "c": torch.zeros(3, 5)}
    turned = exact["b"].clone()
    turned[1] = -turned[1]
    found = cosines({**exact, "b": turned}, exact)
    assert found["worst_layer"] == "b"
    assert found["worst_cosine"] == pytest.approx(-1.0)
    assert cosines(exact, exact)["worst_cosine"] == pytest.approx(1.0)
    dense = FactoredGradients(make_llama(), chunked_causal_loss, sparsification="normal-4*4")
    assert kept_positions(dense) is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"samples": 9}, "multiple of each batch"),
        ({"samples": 4}, "expected 8 or more"),
        ({"batches": ()}, "batches"),
        ({"block": 1}, "blocks of 2"),
        ({"spec": "random_mask-4096->sjlt-64"}, "factored"),
        ({"spec": "nothing-3"}, "nothing"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"weights": "none"}, "weights is 'none'"),
        ({"weights": "pretrained"}, "a shape without weights"),
    ],
)
def test_bad_arguments(tmp_path, changes, match):
    with pytest.raises(GrassError, match=match):
        throughput_run.run(**{**OPTIONS, **changes}, folder=tmp_path)


def test_models_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="could not be had"):
        build(str(tmp_path / "none"), device=torch.device("cpu"))
    make_llama().save_pretrained(tmp_path / "own")
    for weights in ("random", "pretrained"):
        found = build(str(tmp_path / "own"), weights=weights, dtype="float32", device=torch.device("cpu"))
        assert (found.name, found.vocabulary) == ("own", 37)


def on_a_gpu(speed):
    """What a result of a GPU looks like, with made-up numbers."""

    def row(step, tokens, batch=4, layers=0, hessian="", peak=30e9):
        spec = throughput_run.FACTGRASS if step in ("caching", "reference") else ""
        stored = (
            {"rows": 256, "layers": layers, "k": 4096 * layers, "bytes": 1, "problems": []} if step == "caching" else {}
        )
        seconds = {"step": 1.0, "capture": 0.9, "transfer": 0.01, "write": 0.0, "curvature": 0.02}
        return {
            **{"step": step, "spec": spec, "layers": layers, "hessian": hessian, "batch": batch, "note": ""},
            **{"tokens_per_second": tokens, "peak_bytes": peak, "seconds": seconds, "stored": stored},
            **{"first_batch_seconds": 20.0, "since_start_seconds": 45.0},
        }

    rows = [row("caching", speed, layers=225, hessian="Identity"), row("caching", 15000.0, layers=225, hessian="eFIM")]
    rows += [row("plain", 10000.0), row("bare", 20000.0), row("reference", 9000.0, layers=225)]
    rows += [{**row("plain", None, batch=8), "note": "does not fit into memory"}]
    model = {"name": "llama-3.1-8b", "weights": "random", "dtype": "bfloat16", "parameters": 8_030_261_248}
    found = {
        **{"device": "a GPU", "device_type": "cuda", "date": "2026-01-01", "versions": {"torch": "2"}, "rows": rows},
        **{"command": "grass bench throughput", "block": 1024, "samples": 256, "spec": throughput_run.FACTGRASS},
        "model": {**model, "operations_per_token": 3.1e10},
        "product_operations_per_second": 8e14,
        "check": {"rows": 8, "worst_cosine": 0.995, "worst_layer": "x", "median_cosine": 0.999},
    }
    found["check"]["eager"] = {"worst_cosine": 0.994, "worst_layer": "y", "median_cosine": 0.998}
    return {**found, "goals": throughput_run.goals(found)}


def test_goals_are_judged_on_a_gpu():
    judged = {goal["goal"]: goal for goal in on_a_gpu(16000.0)["goals"]}
    assert judged["caching 225 layers, times the plain model"]["measured"] == pytest.approx(1.6)
    assert all(goal["met"] for goal in judged.values())
    assert len(judged) == 5
    assert not on_a_gpu(12000.0)["goals"][0]["met"]


def test_the_page_is_drawn_from_the_json(tmp_path):
    measured, generated = tmp_path / "measured", tmp_path / "generated"
    written = throughput.write_throughput_parts(measured, generated)
    assert all("Not measured yet" in path.read_text() for path in written)
    measured.mkdir()
    (measured / "throughput.json").write_text(json.dumps(on_a_gpu(16000.0)))
    written = {path.name: path for path in throughput.write_throughput_parts(measured, generated)}
    assert written["throughput_rows.svg"].stat().st_size > 1000
    table = written["throughput_table.md"].read_text()
    assert "16,000 | 1.60 | 30.0 GB" in table
    assert "does not fit into memory" in table
    device = written["throughput_device.md"].read_text()
    assert "25,806 tokens/s" in device
    assert "in bfloat16, of each sequence alone, has 0.9940 (y) and 0.9980" in device
    page = (throughput.Path(__file__).parents[2] / "book" / "throughput.md").read_text()
    for name in written:
        assert name.endswith(".svg") or f"_generated/{name}" in page
    for wrong in ("{", "[]", '{"rows": []}'):
        (measured / "throughput.json").write_text(wrong)
        with pytest.raises(GrassError, match="run `grass bench throughput --json PATH` again"):
            throughput.load(measured)


def test_the_page_says_what_fp8_does(tmp_path):
    result = on_a_gpu(16000.0)
    assert "Not measured yet on a GPU" in fp8_scores.fp8_text(result, tmp_path)
    assert "Not measured yet on pretrained weights" in fp8_scores.fp8_text(None, tmp_path)
    fast = {**result["rows"][0], "fp8": True, "tokens_per_second": 24000.0, "peak_bytes": 50e9}
    failed = {**fast, "batch": 8, "tokens_per_second": None, "note": "failed: RuntimeError: x"}
    result["rows"] += [fast, failed]
    result["fp8"] = {"rows": 8, "worst_cosine": 0.91234, "worst_layer": "y", "median_cosine": 0.95}
    # Rows with FP8 products meet no goal and give no plan.
    before = on_a_gpu(16000.0)
    assert throughput_run.goals(result) == before["goals"]
    assert plan.plan_rows(result) == plan.plan_rows(before)
    text = fp8_scores.fp8_text(result, tmp_path)
    assert "24,000 tokens/s, 1.50 times the row without" in text
    assert "not measured: failed: RuntimeError: x" in text
    assert "0.9123 (y)" in text
    assert "without FP8 products 0.9950" in text
    assert "Spearman" not in text
    result["fp8"] |= {"scored_rows": 64, "mean_spearman": 0.87654, "worst_spearman": 0.5}
    assert "0.8765" in fp8_scores.fp8_text(result, tmp_path)
    table = throughput.speed_table(result)
    assert "225 layers; FP8 products | 4 | 24,000 | 2.40" in table
    assert "FP8 products | 8 | failed: RuntimeError: x" in table
    assert throughput.split_table(result) == throughput.split_table(before)
    throughput.speed_figure(result)
    fast["note"] = "not compiled"
    assert "FP8 products; not compiled | 4" in throughput.speed_table(result)
    scores = {"mean_spearman": 0.99, "worst_spearman": 0.98, "top_shared": 0.95}
    variant = {"name": "FP8 products", "mean_cosine": 0.97, "worst_mean_cosine": 0.9, "worst_layer": "z"}
    found = {
        **{"model": "m", "passages": 100, "tokens": 96, "prompts": 5, "layers": 43, "last_blocks": 6, "blocks": 30},
        **{"spec": "s", "date": "2026-01-01", "variants": [{**variant, "scores": {"eFIM": scores}}]},
    }
    (tmp_path / fp8_scores.RESULT).write_text(json.dumps(found))
    text = fp8_scores.fp8_text(None, tmp_path)
    assert "| FP8 products | eFIM | 0.9900 | 0.9800 | 95% | 0.9700 | 0.9000 |" in text
    assert "the mean of the worst layer (z)" in text
    for wrong in ("{", "[]", '{"variants": []}'):
        (tmp_path / fp8_scores.RESULT).write_text(wrong)
        with pytest.raises(GrassError, match="again"):
            fp8_scores.fp8_text(None, tmp_path)


def test_the_plan_follows_from_measured_rates():
    small, large = plan.plan_rows(on_a_gpu(16000.0))
    assert small["gpu_hours"] == pytest.approx(1e9 / 16000 / 3600)
    assert small["bytes"] == pytest.approx(976_562 * 225 * 4096 * 2)
    assert (small["estimated"], large["estimated"], small["gpus_for_weights"], large["gpus_for_weights"]) == (
        False,
        True,
        1,
        2,
    )
    assert large["gpu_hours"] / small["gpu_hours"] == pytest.approx(70e9 / 7.5e9, rel=0.1)
    assert "estimate" in plan.plan_table(on_a_gpu(16000.0))
    other = on_a_gpu(16000.0)
    other["model"]["name"] = "tiny"
    assert "Not computed" in plan.plan_table(other)


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from grass_lib.bench.command import app

    with pytest.raises(UsageError, match="whole numbers"):
        CliRunner().invoke(app, ["throughput", "--batch", "4;8"], catch_exceptions=False)
