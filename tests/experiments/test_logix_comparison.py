"""The comparison's parameters, and what happens where the other systems are not installed."""

import pytest

from grass_lib.errors import UsageError
from grass_lib.experiments import EXPERIMENTS, logix_comparison
from grass_lib.experiments.gpt2_wikitext import protocol
from grass_lib.runner.execute import execute_run
from grass_lib.runner.planning import plan

GIVEN = {
    "model": "random", "tokens": 0, "systems": "", "specs": "", "batch_size": 32, "n_lds_models": 0, "seed": 0,
    "data": "wikitext-2-raw-v1", "base": "pretrained", "device": "cpu", "dampings": "", "at_once": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "gpt5"}, "bank, random"),
        ({"tokens": 128}, "blocks of 128"),
        ({"tokens": 10**9}, "blocks of 128"),
        ({"systems": "logix,trak"}, "'trak'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"specs": "random_mask-64->sjlt-16"}, "factored"),
        ({"device": "toaster"}, "toaster"),
        ({"dampings": "0.1,much"}, "0.1,much"),
        ({"dampings": "0.1,-1"}, "above 0"),
    ],
)
def test_wrong_parameters_are_named(changed, message):
    logix_comparison.validate("embedded", GIVEN)
    with pytest.raises(UsageError, match=message):
        logix_comparison.validate("embedded", {**GIVEN, **changed})


def test_tokens_become_blocks():
    chosen = protocol("embedded")
    assert logix_comparison.blocks(chosen, 0) == chosen.n_train
    assert logix_comparison.blocks(chosen, 1000) == 1000 // chosen.length


def test_without_the_systems_a_batch_goes_on_and_a_named_run_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("GRASS_BASELINES", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path / "runs"))
    assert "make baselines" in logix_comparison.check("embedded")[0]
    everything = {item.experiment: item for item in plan((), "embedded")}
    left_out = everything["logix_comparison"]
    assert list(everything) == list(EXPERIMENTS)
    outcome = execute_run(left_out)
    assert (outcome.state, "make baselines" in outcome.message) == ("skipped", True)
    assert all(not item.left_out for name, item in everything.items() if name != "logix_comparison")
    (named,) = plan(("logix_comparison",), "embedded")
    assert named.problems
    assert not named.left_out
    assert execute_run(named).state == "failed"
