"""The quality measure: an SJLT has the exact variance, and a wrong operator would not."""

import pytest
import torch

from grass_lib.bench.quality import measure_quality
from grass_lib.errors import UsageError


def test_sjlt_has_its_exact_variance() -> None:
    vectors = torch.randn(6, 700, generator=torch.Generator().manual_seed(0))
    quality = measure_quality("sjlt", vectors, 32, 150)
    assert abs(quality.inner_to_theory - 1.0) < 4 * quality.inner_error
    assert abs(quality.norm_to_theory - 1.0) < 4 * quality.norm_error
    assert quality.inner_error < 0.1


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match="vectors"):
        measure_quality("sjlt", torch.ones(1, 5), 2, 3)
