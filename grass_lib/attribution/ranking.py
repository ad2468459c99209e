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


class TopKMerge:
    """`topk` for scores that come in portions of training samples, in order; only the k best and worst are held."""

    def __init__(self, k: int) -> None:
        """Starts with no samples.

        Args:
            k: How many at each end.
        """
        self._k = k
        self._ends: list[tuple[Tensor, Tensor]] = []
        self._seen = 0

    def update(self, scores: Tensor) -> None:
        """Ranks the next samples among those that were held.

        Args:
            scores: ``(n, n_query)`` of the training samples that follow the ones before.

        Raises:
            UsageError: If scores hold NaN.
        """
        if bool(scores.isnan().any()):
            raise UsageError("Scores hold NaN; expected numbers that can be ranked.")
        values = scores.mT
        order = torch.arange(self._seen, self._seen + len(scores), device=scores.device).expand(values.shape)
        self._seen += len(scores)
        ends = self._ends or [(values[:, :0], order[:, :0])] * 2
        self._ends = []
        for (held, places), descending in zip(ends, (True, False), strict=True):
            # Held samples come first and have lower indices, so that a stable sort orders equal scores by index.
            joined, indices = torch.cat([held, values], dim=1), torch.cat([places, order], dim=1)
            ordered, position = joined.sort(dim=1, descending=descending, stable=True)
            self._ends.append((ordered[:, : self._k], indices.gather(1, position[:, : self._k])))

    def result(self) -> TopK:
        """What `topk` gives for all scores together.

        Raises:
            UsageError: If there were fewer samples than k, or k is not positive.
        """
        if not 1 <= self._k <= self._seen:
            raise UsageError(f"k is {self._k}; expected between 1 and the number of training samples, {self._seen}.")
        scores, indices = zip(*self._ends, strict=True)
        return TopK(torch.stack(indices, dim=1), torch.stack(scores, dim=1))
