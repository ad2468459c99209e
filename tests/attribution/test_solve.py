import numpy as np
import pytest
import torch

from grass_lib.attribution import damped_scores
from grass_lib.attribution.solve import METHODS, damping_grid, shifted_solves
from grass_lib.errors import GrassError, UsageError

GRID = [1e-7, 1e-4, 1e-2, 0.1, 1.0, 100.0]


def features(n: int, k: int, m: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, k, dtype=torch.float64)
    return (
        torch.randn(n, k, generator=generator, dtype=torch.float64) * scale,
        torch.randn(m, k, generator=generator, dtype=torch.float64) * scale,
    )


def reference(train, query, damping, relative):
    """The textbook formula with an explicit inverse, one damping value at a time."""
    k = train.shape[1]
    gram = train.T @ train
    unit = torch.trace(gram) / k if relative else 1.0
    eye = torch.eye(k, dtype=torch.float64)
    return torch.stack([train @ torch.linalg.inv(gram + d * unit * eye) @ query.T for d in damping])


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "k"), [(40, 12), (12, 40), (20, 20), (1, 30), (30, 1)])
def test_agrees_with_an_explicit_inverse(n, k, method, relative):
    train, query = features(n, k)
    out = torch.zeros(len(GRID), n, len(query), dtype=torch.float64)
    found = damped_scores(train, query, GRID, relative=relative, method=method, out=out)
    assert found is out
    # The explicit inverse itself loses digits at the smallest damping, where the matrix of k > n is nearly singular.
    torch.testing.assert_close(found, reference(train, query, GRID, relative), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[2:], reference(train, query, GRID[2:], relative), atol=1e-11, rtol=1e-9)


def test_float32_features_lose_no_more_than_their_own_rounding():
    train, query = (value.float() for value in features(60, 24))
    found = damped_scores(train, query, GRID)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), reference(train.double(), query.double(), GRID, True), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("budget", [1, 500, 2000])
@pytest.mark.parametrize(("n", "k"), [(40, 12), (12, 40)])
def test_blocks_change_nothing(monkeypatch, n, k, budget):
    train, query = features(n, k)
    whole = damped_scores(train, query, GRID)
    monkeypatch.setattr("grass_lib.attribution.solve._BLOCK_BYTES", budget)
    torch.testing.assert_close(damped_scores(train, query, GRID), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("damping", [None, "a", "0.1", [0.1, "x"], True, [True], {0.1: 1}, torch.tensor([[0.1, 0.2]])])
def test_what_is_no_damping_is_refused(damping):
    with pytest.raises(UsageError, match=r"damping is .*; expected a number above 0, for example 0\.1, or a list of"):
        damping_grid(damping)


def test_numbers_of_any_kind_are_dampings():
    assert damping_grid(1) == damping_grid(np.float32(1)) == damping_grid(np.array(1.0)) == ([1.0], True)
    assert damping_grid(torch.tensor(1.0)) == ([1.0], True)
    for grid in ((1, 2.0), [torch.tensor(1), np.float32(2)], np.array([1, 2]), torch.tensor([1.0, 2.0]), range(1, 3)):
        assert damping_grid(grid) == ([1.0, 2.0], False)


def test_out_is_added_to():
    train, query = features(20, 6)
    once = damped_scores(train, query, [0.1])
    twice = damped_scores(train, query, [0.1], out=once.clone())
    torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(UsageError, match=r"out has shape \(1, 20, 5\); expected \(2, 20, 5\)"):
        damped_scores(train, query, [0.1, 1.0], out=once)


def test_relative_damping_does_not_depend_on_the_scale_of_the_features():
    train, query = features(20, 6)
    small = damped_scores(train * 1e-4, query * 1e-4, [0.1])
    torch.testing.assert_close(small, damped_scores(train, query, [0.1]))


def nearly_singular():
    """A Gram matrix whose smallest eigenvalue came out as -1e-12 of the largest by rounding."""
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    return turn @ torch.diag(torch.tensor([1.0, -1e-12], dtype=torch.float64)) @ turn.T, turn


def test_eigenvectors_take_over_where_cholesky_fails_and_rounding_counts_as_zero(caplog):
    matrix, turn = nearly_singular()
    with caplog.at_level("INFO", logger="grass_lib"):
        found, large = shifted_solves(matrix, turn, [1e-13, 1.0])
    assert "Cholesky failed at shift 1e-13" in caplog.text
    expected = turn @ torch.diag(1 / torch.tensor([1.0 + 1e-13, 1e-13], dtype=torch.float64))
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-6)
    torch.testing.assert_close(large, turn @ torch.diag(torch.tensor([0.5, 1.0], dtype=torch.float64)))


def test_damping_below_the_resolution_is_an_error_that_gives_the_bound():
    matrix, turn = nearly_singular()
    with pytest.raises(GrassError, match=r"not positive definite\. Use a larger damping, at least 2\.2"):
        list(shifted_solves(matrix, turn, [1e-17]))


def test_bad_input_is_refused():
    train, query = features(20, 6)
    for damping, seen in (([], "empty"), ([0.1, 0.0], "0.0"), ([-1.0], "-1.0"), ([float("nan")], "nan")):
        with pytest.raises(UsageError, match=seen):
            damped_scores(train, query, damping)
    with pytest.raises(UsageError, match="inf"):
        damped_scores(train, query, [float("inf")])
    with pytest.raises(UsageError, match="'qr'"):
        damped_scores(train, query, [0.1], method="qr")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"\(5, 5\)"):
        damped_scores(train, query[:, :5], [0.1])
    with pytest.raises(UsageError, match="at least one sample"):
        damped_scores(train[:0], query, [0.1])
    with pytest.raises(GrassError, match="zero"):
        damped_scores(torch.zeros_like(train), query, [0.1])
    with pytest.raises(GrassError, match="not finite"):
        damped_scores(train * float("inf"), query, [0.1])
    assert torch.count_nonzero(damped_scores(torch.zeros_like(train), query, [0.1], relative=False)) == 0
