"""The GPU gives the numbers of the CPU, deterministically, within bounded memory."""

import pytest
import torch

from grass_lib.projection import build_projector

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SPECS = ["normal-100", "rademacher-200", "sjlt-64", "sjlt_3-64", "fjlt-64", "fjlt-100", "random_mask-100", "grass-50"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("text", SPECS)
def test_same_numbers_as_on_the_cpu(text, dtype):
    p = 5003
    x = torch.randn(33, p).to(dtype)
    cpu = build_projector(text, p, dtype=dtype)(x)
    gpu = build_projector(text, p, dtype=dtype, device="cuda")(x.cuda())
    assert gpu.device.type == "cuda"
    bounds = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-10, 1e-10), torch.bfloat16: (1e-2, 1e-2)}[dtype]
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=bounds[0], atol=bounds[1] * (1 if dtype != torch.float32 else 0.2))


def test_same_tables():
    for text in ("sjlt_3-1000", "grass-1000"):
        cpu, gpu = build_projector(text, 100_003), build_projector(text, 100_003, device="cuda")
        if text.startswith("grass"):
            assert torch.equal(cpu.first.indices, gpu.first.indices.cpu())
            cpu, gpu = cpu.second, gpu.second
        assert torch.equal(cpu.destinations, gpu.destinations.cpu())
        assert torch.equal(cpu.signs, gpu.signs.cpu())
    cpu, gpu = build_projector("fjlt-1000", 100_003), build_projector("fjlt-1000", 100_003, device="cuda")
    for name in ("signs", "rows", "row_signs"):
        assert torch.equal(getattr(cpu, name), getattr(gpu, name).cpu())


@pytest.mark.parametrize("text", SPECS)
def test_bit_identical_again(text):
    p = 20_011
    x = torch.randn(65, p, device="cuda")
    projector = build_projector(text, p, device="cuda")
    first = projector(x)
    for _ in range(3):
        assert torch.equal(projector(x), first)


@pytest.mark.parametrize("text", ["normal-8192", "rademacher-8192", "sjlt-8192", "fjlt-8192", "grass-8192"])
def test_bounded_memory(text):
    p, n = 109_386, 1000
    x = torch.randn(n, p, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    build_projector(text, p, device="cuda")(x)
    # The matrix of a dense type would take 3.6 GB.
    assert torch.cuda.max_memory_allocated() - before < 3 << 30


def test_wrong_device_is_named():
    from grass_lib.errors import UsageError

    with pytest.raises(UsageError, match="was built for cuda:0, and the input is on cpu"):
        build_projector("sjlt-4", 10, device="cuda")(torch.ones(1, 10))
