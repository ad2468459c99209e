"""Every projector against its matrix, built from scratch, and the exactness statements."""

import math

import projection_matrices as matrices
import pytest
import torch

from grass_lib.projection import Mask, build_projector
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec, StageSpec

STREAM = (5, "layer.3")


def expected_matrix(text: str, p: int, stage: str = "projection") -> torch.Tensor:
    spec = StageSpec.parse(text)
    stream = (*STREAM, stage, 2)
    k = spec.k or p
    if spec.family == "normal":
        return matrices.normal(p, k, *stream)
    if spec.family == "rademacher":
        return matrices.rademacher(p, k, *stream)
    if spec.family == "sjlt":
        return matrices.sjlt(p, k, spec.param, *stream)
    if spec.family == "fjlt":
        return matrices.fjlt(p, k, *stream)
    if spec.family == "random_mask":
        kept = Stream(*STREAM, "sparsification", 2).distinct(k, p).tolist()
        return matrices.mask(p, kept, math.sqrt(p / k))
    if spec.family == "grass":
        q = k * spec.param
        return expected_matrix(f"random_mask-{q}", p) @ expected_matrix(f"sjlt-{k}", q)
    return torch.eye(p, dtype=torch.float64)


CASES = [
    ("normal-1", 1),
    ("normal-3", 7),
    ("normal-9", 5),
    ("normal-8", 31),
    ("rademacher-1", 3),
    ("rademacher-130", 9),
    ("rademacher-128", 4),
    ("rademacher-37", 21),
    ("sjlt-1", 1),
    ("sjlt-1", 9),
    ("sjlt-13", 40),
    ("sjlt-50", 7),
    ("sjlt_3-8", 33),
    ("sjlt_20-6", 11),
    ("fjlt-1", 1),
    ("fjlt-1", 6),
    ("fjlt-4", 4),
    ("fjlt-5", 7),
    ("fjlt-5", 43),
    ("fjlt-16", 131),
    ("fjlt-100", 300),
    ("random_mask-1", 1),
    ("random_mask-5", 23),
    ("random_mask-23", 23),
    ("grass-1", 4),
    ("grass-3", 29),
    ("grass_2-9", 18),
    ("identity", 6),
]


@pytest.mark.parametrize(("text", "p"), CASES)
def test_against_the_explicit_matrix(text, p):
    expected = expected_matrix(text, p)
    double = build_projector(text, p, seed=5, name="layer.3", checkpoint=2, dtype=torch.float64)
    assert (double.p, double.k, double.backend) == (p, expected.shape[1], "torch")
    torch.testing.assert_close(double(torch.eye(p, dtype=torch.float64)), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(6, p, dtype=torch.float64, generator=torch.Generator().manual_seed(p))
    torch.testing.assert_close(double(x), x @ expected, rtol=1e-11, atol=1e-11)
    single = build_projector(text, p, seed=5, name="layer.3", checkpoint=2)
    torch.testing.assert_close(single(x.float()).double(), x @ expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("text", ["normal-9", "rademacher-9", "sjlt-9", "sjlt_2-9", "fjlt-9"])
def test_first_and_second_stage_streams(text):
    """In a pair the first stage draws from "sparsification", the second from "projection"."""
    p = 30
    eye = torch.eye(p, dtype=torch.float64)
    first = CompressionSpec.parse(sparsification=text)
    built = build_projector(first, p, seed=5, name="layer.3", checkpoint=2, dtype=torch.float64)
    torch.testing.assert_close(built(eye), expected_matrix(text, p, "sparsification"))
    pair = CompressionSpec.parse(sparsification="random_mask-20", projection=text)
    built = build_projector(pair, p, seed=5, name="layer.3", checkpoint=2, dtype=torch.float64)
    torch.testing.assert_close(built(eye), expected_matrix("random_mask-20", p) @ expected_matrix(text, 20))
    assert built.spec == pair


def test_a_mask_after_another_stage_is_a_projection():
    built = build_projector("sjlt-20->random_mask-5", 30, seed=1)
    kept = Stream(1, "", "projection").distinct(5, 20)
    assert torch.equal(built.second.indices, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grass_is_a_mask_and_then_an_sjlt(dtype):
    p, k, n = 211, 16, 3
    x = torch.randn(4, p, dtype=dtype)
    common = {"seed": 8, "name": "l", "checkpoint": 1, "dtype": dtype}
    kept = build_projector(f"random_mask-{n * k}", p, **common)(x)
    apart = build_projector(f"sjlt-{k}", n * k, **common)(kept)
    assert torch.equal(build_projector(f"grass_{n}-{k}", p, **common)(x), apart)
    assert torch.equal(build_projector(f"random_mask-{n * k}->sjlt-{k}", p, **common)(x), apart)
    alone = build_projector(f"random_mask-{n * k}->identity", p, **common)(x)
    assert torch.equal(alone, kept)


def test_selective_types_restrict_without_a_factor():
    p, kept = 40, [0, 3, 17, 18, 21, 30, 38, 39]
    mask = Mask(torch.tensor(kept), p)
    x = torch.randn(5, p)
    selected = build_projector("selective_mask-8", p, mask=mask)
    assert torch.equal(selected(x), x[:, kept])
    grass = build_projector("selective_grass_2-4", p, mask=mask, seed=3)
    assert torch.equal(grass(x), build_projector("sjlt-4", 8, seed=3)(x[:, kept]))
    first = build_projector("selective_mask-8->sjlt-4", p, mask=mask, seed=3)
    assert torch.equal(first(x), grass(x))


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("normal-8", 1.0),
        ("rademacher-8", 1.0),
        ("sjlt-8", 1.0),
        ("sjlt_4-8", 1.0),
        ("identity", 1.0),
        ("fjlt-8", math.sqrt(8)),
        ("random_mask-8", math.sqrt(8 / 100)),
        ("grass-8", math.sqrt(32 / 100)),
        ("grass_2-8", math.sqrt(16 / 100)),
        ("random_mask-50->fjlt-8", math.sqrt(50 / 100) * math.sqrt(8)),
    ],
)
def test_paper_scale(text, scale):
    assert build_projector(text, 100).paper_scale == pytest.approx(scale)


def test_paper_scale_gives_the_reference_operators():
    """A mask keeps values as they are; the paper's fjlt has entries of 1 and -1."""
    eye = torch.eye(64)
    mask = build_projector("random_mask-8", 64)
    assert (mask(eye) * mask.paper_scale).unique().tolist() == pytest.approx([0.0, 1.0])
    fjlt = build_projector("fjlt-8", 64)
    torch.testing.assert_close((fjlt(eye) * fjlt.paper_scale).abs(), torch.ones(64, 8))


@pytest.mark.parametrize("text", ["normal-8", "sjlt-8", "fjlt-8", "random_mask-8", "grass_2-8"])
def test_other_names_other_operators(text):
    eye = torch.eye(40)
    base = build_projector(text, 40)(eye)
    assert torch.equal(base, build_projector(text, 40)(eye))
    for other in ({"seed": 1}, {"name": "b"}, {"checkpoint": 1}):
        assert not torch.equal(base, build_projector(text, 40, **other)(eye))
