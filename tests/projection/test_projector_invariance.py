"""The same numbers for any batch, chunking, shape, stride and dtype; scratch memory stays small."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grass_lib.projection import Mask, base, build_projector, dense, fjlt, sjlt
from grass_lib.projection.base import tile_elements

SPECS = [
    "normal-21",
    "rademacher-150",
    "sjlt-16",
    "sjlt_3-16",
    "fjlt-16",
    "fjlt-21",
    "random_mask-21",
    "grass-9",
    "random_mask-100->fjlt-5",
    "identity",
]
P = 331


def sample(n: int = 13, p: int = P) -> torch.Tensor:
    return torch.randn(n, p, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("text", SPECS)
def test_batch_size(text):
    projector, x = build_projector(text, P), sample()
    whole = projector(x)
    assert whole.shape == (13, projector.k)
    for size in (1, 2, 5):
        parts = torch.cat([projector(part) for part in x.split(size)])
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projector(x.flip(0)).flip(0), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", SPECS)
def test_chunking(text, monkeypatch):
    x = sample()
    whole = build_projector(text, P)(x)
    for module in (dense, fjlt, sjlt):
        monkeypatch.setattr(module, "tile_elements", lambda device, dtype: 700)
    monkeypatch.setattr(sjlt, "_TABLE_CHUNK", 17)
    torch.testing.assert_close(build_projector(text, P)(x), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", SPECS)
def test_leading_dimensions_and_strides(text):
    projector, x = build_projector(text, P), sample(12)
    whole = projector(x)
    torch.testing.assert_close(projector(x.view(2, 3, 2, P)), whole.view(2, 3, 2, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(projector(x[4]), whole[4], rtol=1e-5, atol=1e-5)
    strided = torch.empty(P, 24)[:, ::2].t()
    strided.copy_(x)
    before = strided.clone()
    torch.testing.assert_close(projector(strided), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(strided, before)
    torch.testing.assert_close(projector(x[:1].expand(5, P)), whole[:1].expand(5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", SPECS)
def test_empty_batches(text):
    projector = build_projector(text, P, dtype=torch.float16)
    assert projector(torch.empty(0, P)).shape == (0, projector.k)
    assert projector(torch.empty(3, 0, P)).shape == (3, 0, projector.k)
    assert projector(torch.empty(0, P)).dtype == torch.float16


@pytest.mark.parametrize("text", SPECS)
def test_output_is_new_memory_and_needs_no_gradient(text):
    projector, x = build_projector(text, P), sample(2).requires_grad_()
    out = projector(x)
    assert not out.requires_grad
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("text", SPECS)
def test_linear(text):
    projector, x = build_projector(text, P, dtype=torch.float64), sample(2).double()
    left = projector(2.5 * x[0] - x[1])
    torch.testing.assert_close(left, 2.5 * projector(x[0]) - projector(x[1]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", SPECS)
def test_half_inputs_accumulate_in_float32(text, half):
    """Equal to projecting the same values as float32; summing in half precision would be off by far more."""
    p = 3000
    x = sample(3, p).to(half)
    expected = build_projector(text, p)(x.float())
    assert torch.equal(build_projector(text, p)(x), expected)
    rounded = build_projector(text, p, dtype=half)(x)
    assert rounded.dtype == half
    assert torch.equal(rounded, expected.to(half))


def test_sum_that_half_precision_cannot_hold():
    """4,096 ones into one output: bfloat16 would stop at 256, float16 keeps no odd number above 2,048."""
    x = torch.ones(1, 4097, dtype=torch.bfloat16)
    signs = build_projector("sjlt-1", 4097).signs.sum()
    assert build_projector("sjlt-1", 4097)(x).item() == signs.item()


@pytest.mark.parametrize("text", SPECS)
def test_float64_keeps_its_precision(text):
    x = sample(2).double()
    x[:, 0] += 1e-9
    double = build_projector(text, P, dtype=torch.float64)
    assert double(x).dtype == torch.float64
    assert build_projector(text, P)(x).dtype == torch.float32
    exact = double(torch.eye(P, dtype=torch.float64))
    torch.testing.assert_close(double(x), x @ exact, rtol=1e-12, atol=1e-12)


class BiggestTensor(TorchDispatchMode):
    """Notes the storage of the biggest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("text", ["normal-512", "rademacher-512", "rademacher-40000"])
def test_dense_holds_tiles_only(text):
    p = 20_000 if text.endswith("512") else 300
    projector, x = build_projector(text, p), torch.ones(2, p)
    with BiggestTensor() as biggest:
        out = projector(x)
    assert out.isfinite().all()
    assert p * projector.k > 8 * tile_elements(x.device, torch.float32)
    assert biggest.numbers <= tile_elements(x.device, torch.float32)


@pytest.mark.parametrize(
    "text", ["sjlt-1000000", "sjlt_3-400000", "fjlt-500000", "random_mask-400000", "grass_2-200000"]
)
def test_nothing_of_size_p_times_k(text):
    """p times k would be 10^11 numbers and more."""
    p = 1_000_000
    with BiggestTensor() as biggest:
        projector = build_projector(text, p)
        out = projector(torch.ones(1, p))
    assert out.shape == (1, projector.k)
    assert biggest.numbers <= 16 * p


def test_mask_of_a_range_that_would_not_fit():
    mask = Mask(torch.tensor([0, 5]), 2**40)
    assert mask.k == 2
    assert base.tile_elements(torch.device("cpu"), torch.float64) == 2**19
