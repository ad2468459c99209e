"""Kept columns and the contraction of many layers on a GPU, against float64."""

import pytest
import torch
from torch import nn

from grass_lib.gradients import FactoredGradients
from grass_lib.kernels.columns import kept_columns
from grass_lib.kernels.contract import contract, destination_table, fits_contraction
from grass_lib.projection import build_projector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def rows(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize(("shape", "k"), [((3, 7, 40), 5), ((1, 2), 1), ((5, 513, 300), 127), ((33, 700), 700)])
def test_kept_columns(shape, k, ones, dtype):
    x = rows(*shape, dtype=dtype)
    index = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(1))[:k].sort().values.cuda()
    found = kept_columns(x, index, ones)
    assert torch.equal(found[..., :k], x[..., index])
    assert found.shape[-1] == k + ones
    assert not ones or bool((found[..., k] == 1).all())
    turned = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(kept_columns(turned, index, ones), found)


@pytest.mark.parametrize("second", [None, "sjlt-50", "sjlt_3-4096"])
@pytest.mark.parametrize(
    ("layers", "samples", "tokens", "k1", "k2"),
    [(3, 4, 512, 128, 128), (70, 2, 37, 16, 32), (2, 1, 1, 48, 16), (1, 5, 33, 64, 64), (2, 3, 100, 16, 256)],
)
def test_contraction(layers, samples, tokens, k1, k2, second):
    lefts = [rows(samples, tokens, k1, seed=i) for i in range(layers)]
    rights = [rows(samples, tokens, k2, seed=100 + i) for i in range(layers)]
    assert all(fits_contraction(*pair) for pair in zip(lefts, rights, strict=True))
    scales = [1.0 + i for i in range(layers)]
    tables, projectors = None, [None] * layers
    if second is not None:
        projectors = [
            build_projector(second, k1 * k2, seed=i, device="cuda", dtype=torch.float64, backend="torch")
            for i in range(layers)
        ]
        tables = [destination_table(one.destinations, one.signs < 0, one.k) for one in projectors]
        scales = [scale * one.c**-0.5 for scale, one in zip(scales, projectors, strict=True)]
    if tokens == 37:  # rows that lie further apart
        lefts = [nn.functional.pad(left, (0, 8))[..., :k1] for left in lefts]
    found = contract(lefts, rights, tables, scales)
    again = contract(lefts, rights, tables, scales)
    assert torch.equal(found, again)
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        exact = (left.double().mT @ right.double()).flatten(1)
        exact = (exact if projectors[i] is None else projectors[i](exact)) * (1.0 + i)
        assert float((found[i] - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("projection", ["identity", "sjlt-100"])
def test_a_recorded_step_uses_it(projection, compile):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.Tanh(), nn.Linear(96, 64), nn.Tanh(), nn.Linear(64, 33))
    model = model.to(device="cuda", dtype=torch.bfloat16)

    def loss(model, batch):
        return model(batch[0]).float().square().sum(dim=(1, 2))

    batch = (rows(4, 20, 40),)
    asked = {"sparsification": "random_mask-16*32", "projection": projection}
    plain, _ = FactoredGradients(model, loss, **asked)(batch)
    recorded = FactoredGradients(model, loss, compile=compile, graph=True, **asked)
    for _ in range(2):
        found, _ = recorded(batch)
    assert set(recorded._together._tables) == (set(plain) if projection != "identity" else set())
    for name, wanted in plain.items():
        # A compiler may round bfloat16 activations elsewhere.
        assert float((found[name] - wanted).norm() / wanted.norm()) < (2e-2 if compile else 1e-5)
