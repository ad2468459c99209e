"""The training samples that help and harm each query most."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.ranks import Ranks
from grass_lib.scores import as_scores

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
        scores: ``(n_train, n_query)``, higher where the sample helps more; an array of NumPy or lists will do.
        k: How many at each end.

    Returns:
        The k highest and k lowest scores of each query.

    Raises:
        UsageError: If the matrix has another shape or holds NaN, or k is out of range or no whole number.
    """
    scores = as_scores(scores)
    if scores.dim() != 2:
        raise UsageError(
            f"Scores have shape {tuple(scores.shape)}; expected (n_train, n_query). "
            "Select one damping value or spec first."
        )
    n_train, n_query = scores.shape
    k = checked_k(k, n_train)
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


def checked_k(k: int, n_train: int) -> int:
    """How many samples to rank at each end.

    Raises:
        UsageError: It is no whole number, or out of range.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise UsageError(f"k is {k!r}; expected a whole number between 1 and {n_train}, that of the training samples.")
    if not 1 <= k <= n_train:
        raise UsageError(f"k is {k}; expected between 1 and the number of training samples, {n_train}.")
    return int(k)


class TopKMerge:
    """`topk` for scores that come in portions of training samples, in order; only the k best and worst are held."""

    def __init__(self, k: int) -> None:
        """Starts with no samples.

        Args:
            k: How many at each end.
        """
        self._k = k
        self._ends: list[tuple[Tensor, Tensor]] = []
        self._seen = self._next = 0

    def update(self, scores: Tensor, first: int | None = None) -> None:
        """Ranks the next samples among those that were held.

        Args:
            scores: ``(n, n_query)`` of the training samples that follow the ones before.
            first: Index of the first of them, where some were left out.

        Raises:
            UsageError: If scores hold NaN.
        """
        if bool(scores.isnan().any()):
            raise UsageError("Scores hold NaN; expected numbers that can be ranked.")
        values = scores.mT
        self._next = self._next if first is None else first
        order = torch.arange(self._next, self._next + len(scores), device=scores.device).expand(values.shape)
        self._next += len(scores)
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

    def result_of(self, ranks: Ranks, n_query: int, dtype: torch.dtype, device: torch.device) -> TopK:
        """What `result` gives for the samples of all ranks together, the same on every rank.

        Args:
            ranks: The processes, each with samples of its own.
            n_query: Number of queries.
            dtype: Of scores.
            device: Of the scores.
        """
        if ranks.alone:
            return self.result()
        # Every rank gives k places an end, those without a sample with index -1.
        indices = torch.full((n_query, 2, self._k), -1, dtype=torch.int64, device=device)
        scores = torch.zeros(n_query, 2, self._k, dtype=dtype, device=device)
        for end, (values, places) in enumerate(self._ends):
            indices[:, end, : places.shape[1]], scores[:, end, : values.shape[1]] = places, values
        return joined_topk([TopK(*pair) for pair in zip(ranks.gather(indices), ranks.gather(scores), strict=True)])


def joined_topk(parts: Sequence[TopK]) -> TopK:
    """One ranking out of rankings of different training samples, as long as one of them.

    Args:
        parts: Rankings of the same queries, equally long; places without a sample have the index -1.
    """
    k = parts[0].indices.shape[2]
    indices, scores = (torch.cat([getattr(part, name) for part in parts], dim=2) for name in ("indices", "scores"))
    ends = []
    for end, descending in enumerate((True, False)):
        # By index first, so that a stable sort by score orders equal scores by index; empty places go last.
        order = indices[:, end].sort(dim=1, stable=True)
        values = scores[:, end].gather(1, order.indices)
        values = values.masked_fill(order.values < 0, -torch.inf if descending else torch.inf)
        place = values.sort(dim=1, descending=descending, stable=True).indices[:, :k]
        ends.append((order.values.gather(1, place), values.gather(1, place)))
    return TopK(*(torch.stack(pair, dim=1) for pair in zip(*ends, strict=True)))
