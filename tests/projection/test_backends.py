"""The optional packages: refused with a reason where they cannot work, equal to ours where they can."""

import importlib.util

import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.projection import build_projector

HAS_GPU = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("text", "backend"), [("sjlt-512", "sjlt"), ("grass-512", "sjlt"), ("rademacher-512", "fast_jl")]
)
def test_no_silent_fallback_on_a_cpu(text, backend):
    with pytest.raises(UsageError, match=f"backend='{backend}' needs a CUDA GPU"):
        build_projector(text, 4096, backend=backend)


@pytest.mark.parametrize(
    ("text", "backend"),
    [("normal-512", "sjlt"), ("rademacher-512", "sjlt"), ("fjlt-512", "fast_jl"), ("sjlt-512", "fast_jl")],
)
def test_types_that_a_backend_does_not_serve(text, backend):
    with pytest.raises(UsageError, match="has nothing to do"):
        build_projector(text, 4096, backend=backend)


def test_limits_of_the_packages():
    with pytest.raises(UsageError, match="17 nonzeros per column, and the package sjlt takes at most 16"):
        build_projector("sjlt_17-64", 100, backend="sjlt")
    with pytest.raises(UsageError, match="takes at most 2 here"):
        build_projector("sjlt_3-2", 100, backend="sjlt")
    with pytest.raises(UsageError, match="needs a multiple of 512"):
        build_projector("rademacher-100", 100, backend="fast_jl")
    with pytest.raises(UsageError, match="half precision, and float64"):
        build_projector("rademacher-512", 100, backend="fast_jl", dtype=torch.float64)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")
@pytest.mark.parametrize(("text", "backend"), [("sjlt-512", "sjlt"), ("rademacher-512", "fast_jl")])
def test_missing_package_says_how_to_install(text, backend):
    if importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is installed")
    with pytest.raises(UsageError, match="run `make cuda`"):
        build_projector(text, 4096, backend=backend, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU or not importlib.util.find_spec("sjlt"), reason="needs a GPU and the package sjlt")
@pytest.mark.parametrize("text", ["sjlt-300", "sjlt_4-300", "sjlt_16-300", "grass_2-300"])
def test_package_sjlt_agrees_with_ours(text):
    p = 10_007
    x = torch.randn(2 * p, 9, device="cuda").t()[:, ::2]
    torch.manual_seed(0)
    state = torch.cuda.get_rng_state()
    projector = build_projector(text, p, backend="sjlt", device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert projector.backend == "sjlt"
    ours = build_projector(text, p, device="cuda")(x)
    torch.testing.assert_close(projector(x), ours, rtol=1e-4, atol=1e-4)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.testing.assert_close(projector(x.clone()), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(
    not HAS_GPU or not importlib.util.find_spec("fast_jl"), reason="needs a GPU and the package fast_jl"
)
@pytest.mark.parametrize("n", [1, 8, 16, 33, 100])
def test_package_fast_jl_is_an_isometry(n):
    p = 5000
    x = torch.randn(n, p, device="cuda") * 1e-9  # below what half precision holds
    projector = build_projector("rademacher-4096", p, backend="fast_jl", device="cuda")
    y = projector(x)
    assert projector.backend == "fast_jl"
    # Independent signs give a spread of 1.1 %; too many of the package's tiles would give 8 %.
    torch.testing.assert_close(y.norm(dim=1) / x.norm(dim=1), torch.ones(n, device="cuda"), rtol=0.06, atol=0)
    assert (projector(x[:1]) - y[:1]).norm() < 2e-2 * y[:1].norm()
    other = build_projector("rademacher-4096", p, backend="fast_jl", device="cuda", seed=1)(x)
    assert (other - y).norm() > 0.5 * y.norm()
