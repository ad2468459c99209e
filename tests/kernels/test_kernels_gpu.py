"""GPU kernels against the PyTorch projectors in float64: same indices and signs, errors of fp32 rounding."""

import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.projection import build_projector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

CASES = [
    (3, 1, "sjlt-5"),
    (1, 1, "rademacher-1"),
    (3, 17, "sjlt-1"),
    (5, 27_347, "sjlt-1024"),
    (64, 10_007, "sjlt-4096"),
    (9, 5_003, "sjlt_4-100"),
    (33, 20_001, "sjlt_16-4096"),
    (7, 9_999, "sjlt-65536"),
    (5, 3_001, "blocksjlt-333"),
    (5, 10_000, "fjlt-4096"),
    (4, 30_001, "fjlt-3000"),
    (3, 5_000, "fjlt-256"),
    (2, 333, "fjlt-5"),
    (2, 10, "fjlt-1"),
    (3, 50_000, "fjlt-8192"),
    (2, 70_000, "fjlt-20000"),
    (2, 150_001, "fjlt-65536"),
    (64, 10_001, "rademacher-300"),
    (130, 5_003, "rademacher-700"),
    (20, 3_001, "normal-300"),
    (5, 2, "normal-7"),
    (5, 1_000, "random_mask-1000"),
    (70, 50_001, "random_mask-333"),
    (6, 50_001, "grass-1024"),
    (6, 50_001, "grass_2-7"),
    (6, 50_001, "random_mask-5000->sjlt_3-64"),
]


def _inputs(batch: int, p: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + p)
    return torch.randn(batch, p, generator=generator).to(device="cuda", dtype=dtype)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "p", "spec"), CASES)
def test_kernel_equals_reference(batch: int, p: int, spec: str, dtype: torch.dtype) -> None:
    x = _inputs(batch, p, dtype)
    exact = build_projector(spec, p, seed=3, device="cuda", dtype=torch.float64, backend="torch")(x.double())
    kernel = build_projector(spec, p, seed=3, device="cuda", backend="kernel")
    assert kernel.backend == "kernel"
    found = kernel(x)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert _error(found, exact) < 1e-6
    assert torch.equal(found, kernel(x)), "two calls differ"
    half = build_projector(spec, p, seed=3, device="cuda", dtype=torch.bfloat16, backend="kernel")(x)
    assert _error(half, exact) < 5e-3


@pytest.mark.parametrize(
    "spec", ["sjlt-300", "fjlt-300", "rademacher-300", "normal-300", "random_mask-300", "grass-300"]
)
def test_strides_sides_and_leading_dimensions(spec: str) -> None:
    wide = _inputs(6, 5_011, torch.float32)
    kernel = build_projector(spec, 5_000, device="cuda", backend="kernel")
    exact = build_projector(spec, 5_000, device="cuda", dtype=torch.float64, backend="torch")
    for x in (wide[:, 1:5_001], wide[::2, 11:], wide[:, 3:5_003].t().contiguous().t(), wide[:1, :5_000].expand(4, -1)):
        assert _error(kernel(x), exact(x.double())) < 1e-6
    x = wide[:, :5_000]
    assert kernel(x.reshape(2, 3, 5_000)).shape == (2, 3, 300)
    assert torch.equal(kernel(x.reshape(2, 3, 5_000)).reshape(6, 300), kernel(x))
    assert kernel(x[:0]).shape == (0, 300)
    assert kernel(x[0]).shape == (300,)
    for batch in (1, 2, 5):
        assert _error(kernel(x[:batch]), exact(x[:batch].double())) < 1e-6


@pytest.mark.parametrize(
    "spec", ["sjlt-300", "fjlt-300", "rademacher-300", "normal-300", "random_mask-300", "grass-300"]
)
def test_numbers_of_cpu_and_gpu_agree(spec: str) -> None:
    x = _inputs(3, 2_000, torch.float32)
    on_cpu = build_projector(spec, 2_000, seed=1, dtype=torch.float64)(x.cpu().double())
    assert _error(build_projector(spec, 2_000, seed=1, device="cuda", backend="kernel")(x).cpu(), on_cpu) < 1e-6


@pytest.mark.parametrize(
    "spec", ["sjlt-300", "fjlt-300", "rademacher-300", "normal-300", "random_mask-300", "grass-300"]
)
def test_cuda_graph(spec: str) -> None:
    x = _inputs(16, 5_000, torch.float32)
    kernel = build_projector(spec, 5_000, device="cuda", backend="kernel")
    kernel(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel(x)
    x.copy_(_inputs(16, 5_001, torch.float32)[:, 1:])
    graph.replay()
    assert torch.equal(captured, kernel(x))


def test_current_stream() -> None:
    x = _inputs(16, 100_000, torch.float32)
    kernel = build_projector("sjlt-1024", 100_000, device="cuda", backend="kernel")
    before = kernel(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.mul_(2.0)
        after = kernel(x)  # right only if it waits for this stream
    side.synchronize()
    assert torch.equal(after, before * 2.0)


@pytest.mark.parametrize("spec", ["sjlt-512", "fjlt-512", "rademacher-512", "random_mask-512", "grass-512"])
def test_more_than_two_to_the_31_elements(spec: str) -> None:
    batch, p = 300, 8_000_003
    x = torch.zeros(batch, p, dtype=torch.float16, device="cuda")
    x[-1] = _inputs(1, p, torch.float16)[0]
    found = build_projector(spec, p, device="cuda", backend="kernel")(x)
    exact = build_projector(spec, p, device="cuda", dtype=torch.float64, backend="torch")(x[-1:].double())
    assert _error(found[-1:], exact) < 5e-6  # sums of 8 million terms in fp32
    assert not found[:-1].any()


@pytest.mark.parametrize("value", [1e-30, 1e30])
def test_rademacher_keeps_accuracy_at_all_magnitudes(value: float) -> None:
    x = _inputs(9, 4_000, torch.float32)
    x[:, ::2] *= value
    x[0] = 0.0
    exact = build_projector("rademacher-128", 4_000, device="cuda", dtype=torch.float64, backend="torch")(x.double())
    found = build_projector("rademacher-128", 4_000, device="cuda", backend="kernel")(x)
    assert _error(found, exact) < 1e-6
    assert not found[0].any()


def test_auto_takes_the_kernel_and_float64_the_reference() -> None:
    assert build_projector("sjlt-64", 1_000, device="cuda").backend == "kernel"
    assert build_projector("grass-64", 1_000, device="cuda").backend == "kernel"
    assert build_projector("sjlt-64", 1_000, device="cuda", dtype=torch.float64).backend == "torch"


def test_normal_agrees_on_both_sides_of_the_number_of_rows_from_which_torch_is_faster() -> None:
    rows = torch.randn(600, 1_000, device="cuda")
    many, few = (build_projector("normal-64", 1_000, device="cuda") for _ in range(2))
    assert torch.allclose(many(rows)[:100], few(rows[:100]), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="float64"):
        build_projector("sjlt-64", 1_000, device="cuda", dtype=torch.float64, backend="kernel")
