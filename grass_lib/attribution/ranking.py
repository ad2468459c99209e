"""The training samples that help and harm each query most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError

_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class TopK:
    """Proponents and opponents of each query.

    Attributes:
        indices: Training samples ``(n_query, 2, k)``: ``[:, 0]`` proponents from the highest score down, ``[:, 1]``
            opponents from the lowest score up.
        scores: Their scores, in the same layout.
    """

    indices: Tensor
    scores: Tensor

    @property
    def proponents(self) -> Tensor:
        """Indices ``(n_query, k)``, most helpful first."""
        return self.indices[:, 0]

    @property
    def opponents(self) -> Tensor:
        """Indices ``(n_query, k)``, most harmful first."""
        return self.indices[:, 1]


def topk(scores: Tensor, k: int = 10) -> TopK:
    """Ranks the training samples of each query; equal scores are ordered by training index.

    Args:
        scores: ``(n_train, n_query)``, higher where the sample helps more.
        k: How many at each end.

    Returns:
        The k highest and k lowest scores of each query.

    Raises:
        UsageError: If the matrix has another shape or holds NaN, or k is out of range.
    """
    if scores.dim() != 2:
        raise UsageError(
            f"Scores have shape {tuple(scores.shape)}; expected (n_train, n_query). "
            "Select one damping value or spec first."
        )
    n_train, n_query = scores.shape
    if not 1 <= k <= n_train:
        raise UsageError(f"k is {k}; expected between 1 and the number of training samples, {n_train}.")
    indices = torch.empty(n_query, 2, k, dtype=torch.int64, device=scores.device)
    values = torch.empty(n_query, 2, k, dtype=scores.dtype, device=scores.device)
    for start in range(0, n_query, _QUERIES_AT_ONCE):
        block = scores[:, start : start + _QUERIES_AT_ONCE].mT
        if bool(block.isnan().any()):
            raise UsageError("Scores hold NaN; expected numbers that can be ranked.")
        for end, descending in enumerate((True, False)):
            # A stable sort, because torch.topk promises no order among equal scores and differs between devices.
            ordered, order = block.sort(dim=1, descending=descending, stable=True)
            indices[start : start + len(block), end] = order[:, :k]
            values[start : start + len(block), end] = ordered[:, :k]
    return TopK(indices, values)
