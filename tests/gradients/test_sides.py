"""Sides of a factored compression in the form in which they are applied."""

import pytest
import torch
import zoo

from grass_lib.gradients import FactoredGradients, sides
from grass_lib.gradients.outputs import cross_entropy
from grass_lib.gradients.sides import Side, applied_matrix, matrix_of
from grass_lib.kernels.columns import KeptColumns, product_is_best


def kept(d=10, index=(1, 4, 9)):
    return Side(d, len(index), index=torch.tensor(index), scale=2.0)


def test_kept_coordinates_are_multiplied_by_zeros_and_ones(monkeypatch):
    monkeypatch.setattr(sides, "product_is_best", lambda *_: True)
    matrix = matrix_of(kept(), torch.bfloat16)
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(x @ matrix, x[:, [1, 4, 9]])  # the scale comes later
    assert matrix.dtype == torch.bfloat16
    assert torch.equal(matrix.double() * 2.0, kept().dense())


def test_a_side_that_stays_has_no_matrix(monkeypatch):
    monkeypatch.setattr(sides, "product_is_best", lambda *_: True)
    assert matrix_of(Side(4, 4), torch.float32) is None
    assert applied_matrix(Side(4, 4), torch.float32) is None


def test_the_bias_column_does_not_count_as_a_column(monkeypatch):
    asked = []
    monkeypatch.setattr(sides, "product_is_best", lambda *given: asked.append(given[:2]))
    assert matrix_of(kept(), torch.float32, bias=True) is None
    assert asked == [(9, 3)]


@pytest.mark.parametrize(
    ("d", "k", "dtype", "device", "best"),
    [
        (768, 128, torch.bfloat16, "cuda", True),
        (768, 128, torch.float16, "cuda", True),
        (768, 128, torch.float32, "cuda", False),
        (768, 128, torch.bfloat16, "cpu", False),
        (14336, 128, torch.bfloat16, "cuda", False),
        (768, 100, torch.bfloat16, "cuda", False),
    ],
)
def test_where_a_product_is_best(d, k, dtype, device, best, monkeypatch):
    monkeypatch.setattr(KeptColumns, "product_to", 16.0)
    assert product_is_best(d, k, dtype, torch.device(device)) is best


def test_matrices_applied_in_another_type_rest_on_the_cpu():
    side = Side(4, 2, matrix=torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert side.at_rest(torch.float32) is side
    moved = side.at_rest(torch.bfloat16)
    assert moved.matrix.device.type == "cpu"
    assert torch.equal(moved.matrix, side.matrix)


@pytest.mark.parametrize("name", ["mlp", "conv1d", "image", "text"])
def test_rows_are_the_same_however_columns_are_taken(name, monkeypatch):
    model = zoo.make_model(name, dtype=torch.float64)
    batch = zoo.make_batch(name, zoo.make_samples(name, 5, dtype=torch.float64))

    def loss(model, batch):
        return model(*batch).flatten(1).sum(dim=1) if name == "text" else cross_entropy(model, batch)

    spec = {"sparsification": "random_mask-4*3", "projection": "sjlt-5", "dtype": torch.float64}
    expected, _ = FactoredGradients(model, loss, **spec)(batch)
    used = []
    monkeypatch.setattr(sides, "product_is_best", lambda *given: used.append(given) or True)
    found, _ = FactoredGradients(model, loss, **spec)(batch)
    assert used
    assert expected.keys() == found.keys()
    for layer in expected:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-12, atol=1e-12)
