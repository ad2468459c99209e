"""Matrices of scores, as they are given to whatever ranks or evaluates them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grass_lib.errors import UsageError


def as_scores(scores: Any) -> Tensor:
    """Scores as a tensor, which is the one that was given, or shares a NumPy array's memory, where possible.

    Args:
        scores: A tensor, an array of NumPy, or nested lists of numbers, of any shape.

    Raises:
        UsageError: They are nothing of that, or no real numbers.
    """
    if isinstance(scores, Mapping):
        raise UsageError(
            f"scores are a {type(scores).__name__} with the keys {', '.join(map(repr, scores))}; expected one tensor "
            "(n_train, n_query): select one of them"
        )
    if isinstance(scores, np.ndarray) and min(scores.strides, default=0) < 0:
        scores = scores.copy()  # torch has no negative strides
    try:
        found = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"scores are a {type(scores).__name__}, which is no matrix of numbers ({str(error).splitlines()[0]}); "
            "expected a tensor (n_train, n_query)"
        ) from error
    if found.is_complex() or found.dtype == torch.bool:
        raise UsageError(f"scores are of type {found.dtype}; expected real numbers")
    return found
