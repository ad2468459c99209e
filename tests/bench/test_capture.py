"""The capture benchmark on a tiny model, its goals, and the section drawn from it."""

import json

import pytest

from grass_lib.bench import capture
from grass_lib.bench.capture_goals import goals
from grass_lib.errors import SpecError, UsageError
from grass_lib.report.capture import capture_section, write_capture_section

SPECS = ("random_mask-8*8->sjlt-16", "normal-4*4->identity")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "new" / "capture.json"
    found = capture.run("tiny", specs=SPECS, compiled=False, rounds=2, repeats=2, device="cpu", out=out)
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    return found


def test_every_step_is_measured_in_both_types(result):
    steps = [("activations", ""), *(("caching", spec) for spec in SPECS), ("training", "")]
    assert [(row["dtype"], row["step"], row["spec"]) for row in result["rows"]] == [
        (dtype, *step) for dtype in ("bfloat16", "float32") for step in steps
    ]
    for row in result["rows"]:
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] is None  # of a CPU
        assert (row["speed_share"] is not None) == (row["step"] == "caching")
    assert goals(result) == []
    assert len(capture.summary(result).splitlines()) == 8


def test_a_compiled_pass_is_measured():
    found = capture.run("tiny", specs=SPECS[:1], dtypes=["float32"], rounds=2, repeats=1, device="cpu")
    assert [row["step"] for row in found["rows"]] == ["activations", "caching", "training"]
    assert found["compiled"]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"shape": "gpt3"}, UsageError, "gpt3.*gpt2 or tiny"),
        ({"dtypes": ["float16"]}, UsageError, "float16.*bfloat16 or float32"),
        ({"dtypes": []}, UsageError, "nothing"),
        ({"dtypes": ["float32", "float32"]}, UsageError, "each once"),
        ({"specs": []}, UsageError, "empty.*sjlt-4096"),
        ({"specs": [""]}, UsageError, "empty.*sjlt-4096"),
        ({"specs": ["normal-4*4->identity", "normal-4*4->identity"]}, UsageError, "each once"),
        ({"rounds": 1}, UsageError, "at least 2 and 1"),
        ({"repeats": 0}, UsageError, "at least 2 and 1"),
        ({"batch": -1}, UsageError, "batch is -1"),
        ({"specs": ["sjlt_4096"]}, SpecError, "sjlt"),
        ({"specs": ["selective_mask-4*4->identity"]}, UsageError, "without files"),
        ({"shape": "gpt2"}, UsageError, "hours on a CPU; expected tiny"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(given, error, words):
    with pytest.raises(error, match=words):
        capture.run(**{"shape": "tiny", "device": "cpu"} | given)


def rows(dtype, speeds, bytes_, share):
    steps = [("activations", "", None), ("caching", "a->b", share), ("training", "", None)]
    return [
        {
            "dtype": dtype,
            "step": step,
            "spec": spec,
            "tokens_per_second": speed,
            "peak_bytes": peak,
            "speed_share": one,
            "speed_share_half_width": None if one is None else 0.002,
        }
        for (step, spec, one), speed, peak in zip(steps, speeds, bytes_, strict=True)
    ]


def on_gpu(result):
    measured = rows("bfloat16", (1000.0, 955.0, 300.0), (100, 104, 250), 0.949)
    measured += rows("float32", (100.0, 99.0, 120.0), (200, 212, 500), 0.99)
    return {**result, "device_type": "cuda", "device": "a GPU", "rows": measured}


def test_goals_are_judged_within_one_type(result):
    found = {goal["goal"]: (round(goal["measured"], 3), goal["met"]) for goal in goals(on_gpu(result))}
    assert found == {
        "bfloat16: speed, as a share of the passes alone": (0.949, False),
        "bfloat16: memory, as a share of the passes alone": (1.04, True),
        "bfloat16: speed, times that of training": (3.183, True),
        "bfloat16: memory, as a share of training's": (0.416, True),
        "float32: speed, as a share of the passes alone": (0.99, True),
        "float32: memory, as a share of the passes alone": (1.06, False),
        "float32: speed, times that of training": (0.825, False),
        "float32: memory, as a share of training's": (0.424, True),
    }
    cut_off = {**on_gpu(result), "rows": on_gpu(result)["rows"][:1]}
    assert goals(cut_off) == []


def test_the_section_says_what_was_measured(result, tmp_path):
    assert write_capture_section(tmp_path, tmp_path / "generated").read_text() == ""
    (tmp_path / "capture.json").write_text(json.dumps(on_gpu(result)))
    text = write_capture_section(tmp_path, tmp_path / "generated").read_text()
    assert text == capture_section(tmp_path)
    assert "| bfloat16 | caching, a->b | 955 | 0.9490 ± 0.0020 | 0.00 GB | 1.040 |" in text
    assert "| float32 | transformers' model with the gradients of all weights, not compiled | 120 | 1.20 |" in text
    assert "| at least 0.95 | 0.949 | missed by 0.1% |" in text
    assert "grass bench capture" in text
    (tmp_path / "capture.json").write_text(json.dumps(result))  # of a CPU, without memory
    text = capture_section(tmp_path)
    assert "CUDA graphs" not in text
    assert "| goal |" not in text
