"""Sides of a factored compression in the form in which they are applied."""

import torch

from grass_lib.gradients.sides import Side


def test_matrices_applied_in_another_type_rest_on_the_cpu():
    side = Side(4, 2, matrix=torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    assert side.at_rest(torch.float32) is side
    moved = side.at_rest(torch.bfloat16)
    assert moved.matrix.device.type == "cpu"
    assert torch.equal(moved.matrix, side.matrix)
    assert torch.equal(side.applied(torch.bfloat16), side.matrix.bfloat16())


def test_a_side_without_a_matrix_has_none_to_apply():
    assert Side(4, 4).applied(torch.float32) is None
    assert Side(4, 4).at_rest(torch.float32).is_identity
