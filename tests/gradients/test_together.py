"""Contractions of many layers at once: the layers' own, side by side."""

import pytest
import torch
from torch import nn

from grass_lib.gradients import FactoredGradients
from grass_lib.gradients import together as module
from grass_lib.gradients.outputs import cross_entropy


def layers_of(spec="normal-4*3", dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 5))
    factored = FactoredGradients(model.to(dtype), cross_entropy, sparsification=spec, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    sides = {
        name: tuple(
            torch.randn(3, 7, k, generator=generator).to(dtype) for k in (part.k for part in factored.sides(name))
        )
        for name in factored.layers
    }
    return factored, sides


@pytest.mark.parametrize("copied", [1 << 26, 1])
def test_products_are_those_of_the_layers(copied, monkeypatch):
    monkeypatch.setattr(module, "_COPIED", copied)
    factored, sides = layers_of()
    found = factored._together.products(sides)
    # One at a time there is nothing to put side by side.
    assert found.keys() == (sides.keys() if copied > 1 else set())
    for name, row in found.items():
        left, right = sides[name]
        torch.testing.assert_close(row, torch.einsum("btk,btl->bkl", left, right).flatten(1), rtol=1e-12, atol=1e-12)


def test_layers_alone_with_their_shapes_are_left():
    factored, sides = layers_of()
    name = next(iter(sides))
    sides[name] = sides[name][0][:, :5], sides[name][1][:, :5]
    assert factored._together.products(sides).keys() == sides.keys() - {name}


def test_layers_that_add_a_bias_column_are_left():
    factored, sides = layers_of("identity")
    assert factored._together.products(sides) == {}
