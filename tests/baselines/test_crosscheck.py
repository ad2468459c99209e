"""Every system against ours on its own random matrices, in its own process."""

import json

import pytest
import torch
from baseline_tools import needs_baselines

from grass_lib.baselines import SYSTEMS, run_system
from grass_lib.baselines.crosscheck import LIMIT, checks, correlations, judge, spearman

OTHERS = [name for name in SYSTEMS if name != "grass_lib"]


@pytest.mark.system
@needs_baselines
@pytest.mark.parametrize("system", OTHERS)
def test_same_scores_with_the_same_matrices(system, workload, tmp_path):
    chosen = checks(system, k=16)
    outcomes = run_system(system, workload, [item.options for item in chosen], folder=tmp_path, facts=True, timeout=600)
    for check, outcome in zip(chosen, outcomes, strict=True):
        found = judge(workload, check, outcome)
        assert found["spearman"] >= LIMIT, found
        assert found["largest_difference"] < 1e-4, found
        assert outcome.version
        assert outcome.stored_bytes > 0 or outcome.details.get("in_memory")
        assert all(seconds >= 0 for seconds in outcome.seconds.values())
    facts = outcomes[0].details["facts"]
    assert facts
    assert all(fact["seen"] for fact in facts)
    assert not list(tmp_path.glob("work-*"))
    json.dumps(outcomes[0].details)


def test_a_correlation_that_must_fail():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(30, 4, generator=generator) for _ in range(2))
    found = correlations([first, first * 2 + 1, second])
    assert found[0, 1] == pytest.approx(1.0)
    assert abs(found[0, 2]) < 0.5


def test_ranks_with_ties():
    one = torch.tensor([[1.0], [2.0], [2.0], [3.0]])
    other = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
    assert float(spearman(one, other)) == pytest.approx(0.9486832980505138)
    assert float(spearman(torch.ones(4, 1), other)) == 0.0
