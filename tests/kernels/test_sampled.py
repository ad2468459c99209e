"""Chosen entries of weight gradients on a CPU: tables and grid of the kernel, followed step by step."""

import pytest
import torch
from sampled_cases import LAYERS

from grass_lib.gradients import MaskedGradients
from grass_lib.gradients.masked_formulas import masked_layer
from grass_lib.kernels import sampled
from grass_lib.kernels.sampled import SampledPlan

N, ITEMS = 3, 4


def emulate(left: torch.Tensor, right: torch.Tensor, plan: SampledPlan, size: int, threads: int) -> torch.Tensor:
    """The kernel's loops over blocks, threads and entries, in float64."""
    out = torch.full((len(left), size), torch.nan, dtype=torch.float64)
    entries, places = plan.entries.tolist(), plan.places.tolist()
    for sample in range(len(left)):
        a, b = left[sample].tolist(), right[sample].tolist()
        for block in range(plan.blocks):
            for slot in range(threads // plan.group):
                first = (block * (threads // plan.group) + slot) * ITEMS
                for j in range(ITEMS):
                    if first + j >= size:
                        continue
                    row, base = entries[first + j]
                    lanes = [
                        sum(
                            a[row + t] * (1.0 if base < 0 else b[base + places[t]])
                            for t in range(lane, len(places), plan.group)
                        )
                        for lane in range(plan.group)
                    ]
                    assert torch.isnan(out[sample, first + j])
                    out[sample, first + j] = sum(lanes)
    return out


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_tables_and_grid_reach_every_entry_once(name, monkeypatch):
    seen, real = [], sampled.sampled_reference

    def spy(left, right, plan):
        seen.append((left, right, plan))
        return real(left, right, plan)

    monkeypatch.setattr(sampled, "sampled_reference", spy)
    module, shape = LAYERS[name]
    module = module.double()
    x = torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = sum(parameter.numel() for parameter in module.parameters())
    indices = torch.randperm(p, generator=torch.Generator().manual_seed(1))[: p // 5].sort().values

    def output(model, batch):
        return model(batch[0]).square().flatten(1).sum(dim=1)

    gradients = MaskedGradients(module, output, indices, dtype=torch.float64)
    wanted, _ = gradients(None, (x,))
    (layer,) = gradients._layers.values()
    other = masked_layer("", module, layer.parts, torch.device("cpu"), kernel=True)
    with torch.enable_grad():
        y = module(x)
        delta = torch.autograd.grad(y.square().sum(), y)[0]
    found = other.rows(delta, (x,))
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)
    ((left, right, plan),) = seen
    assert plan.group & (plan.group - 1) == 0
    assert plan.group <= 32
    followed = emulate(left, right, plan, other.size, sampled._THREADS)
    torch.testing.assert_close(followed, wanted, atol=1e-10, rtol=1e-10)
