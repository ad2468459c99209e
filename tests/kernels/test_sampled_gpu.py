"""Chosen entries of weight gradients on a GPU, against PyTorch in float64."""

import copy

import pytest
import torch
from sampled_cases import LAYERS
from torch import nn

from grass_lib.errors import UsageError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, margin

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def squares(model, batch):
    return model(batch[0]).float().square().flatten(1).sum(dim=1)


@pytest.fixture(autouse=True)
def exact_products():
    """No rounding of factors to 10 bits, in convolutions either."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("backend", ["torch", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers(name, dtype, backend):
    module, shape = LAYERS[name]
    module = copy.deepcopy(module).to(device="cuda", dtype=dtype)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(dtype=dtype)
    p = sum(parameter.numel() for parameter in module.parameters())
    indices = torch.randperm(p, generator=torch.Generator().manual_seed(1))[: p // 3].sort().values
    gradients = MaskedGradients(module, squares, indices, backend=backend)
    rows, _ = gradients(None, (x,))
    again, _ = gradients(None, (x,))
    assert torch.equal(rows, again)
    exact = copy.deepcopy(module).cpu().double()
    wanted, _ = PerSampleGradients(exact, lambda m, b: m(b[0]).square().flatten(1).sum(dim=1), dtype=torch.float64)(
        None, (x.double(),)
    )
    wanted = wanted[:, indices]
    # Half types round the layer's own output and its gradient before anything is added.
    limit = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert float((rows.cpu().double() - wanted).norm() / wanted.norm()) < limit


def test_a_model_of_all_kinds_gives_the_same_with_and_without_the_kernel():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(4, 32),
        nn.Flatten(2),
        nn.LayerNorm(64),
        nn.Linear(64, 10),
        nn.AdaptiveAvgPool2d((1, 10)),
        nn.Flatten(),
    ).cuda()
    samples = torch.randn(37, 3, 16, 16), torch.arange(37) % 10
    full, values = PerSampleGradients(model, margin)(None, samples)
    indices = torch.randperm(full.shape[1], generator=torch.Generator().manual_seed(1))[:3000].sort().values
    found = {}
    for backend in ("torch", "kernel"):
        gradients = MaskedGradients(model, margin, indices, backend=backend, micro_batch=16)
        found[backend], outputs = gradients(None, samples)
        assert set(gradients.routes.values()) == {"layer"}
        torch.testing.assert_close(outputs, values, atol=1e-5, rtol=1e-5)
        scale = float(full.abs().max())
        torch.testing.assert_close(found[backend], full[:, indices.cuda()], atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(found["torch"], found["kernel"], atol=1e-6 * scale, rtol=1e-4)


def test_float64_is_refused_by_the_kernel_alone():
    model, batch = nn.Linear(4, 3).cuda().double(), (torch.randn(2, 4, dtype=torch.float64),)
    indices = torch.arange(5)
    MaskedGradients(model, squares, indices)(None, batch)
    with pytest.raises(UsageError, match="float64"):
        MaskedGradients(model, squares, indices, backend="kernel")(None, batch)
