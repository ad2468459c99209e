"""What a learned mask is fitted to and checked on: rows, queries and their full inner products."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.masks.energy import add_squares
from grass_lib.masks.objective import has_variation, pearson_gradient, spearman_rows
from grass_lib.masks.rows import HeldRows, Part, Rows, WalkedRows, column_blocks, hold
from grass_lib.masks.source import GradientSource, check_nonzero
from grass_lib.rng import Stream

MAX_QUERIES = 512
"""Most rows that serve as queries; more are thinned out at random."""
_CHUNK = 256
# With fewer training rows than this, the masks are checked on the rows that they are fitted to (and other queries).
_FEWEST_TO_SPLIT = 30
_MOST_HELD_OUT = 1000


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows, the queries that go with them, and the full inner products.

    Attributes:
        rows: The rows.
        queries: int64, positions among the problem's queries.
        full: Inner products, float32 ``(len(queries), rows.n)``.
    """

    rows: Rows
    queries: Tensor
    full: Tensor


class Problem:
    """The pairs that a mask is fitted to, and held-out ones: other queries and other rows.

    Attributes:
        fit: Pairs to learn from.
        held_out: Pairs to choose by.
        energy: Second moments of the rows times n, float64 ``(p,)``.
    """

    def __init__(
        self, rows: tuple[Rows, Rows], queries: HeldRows, split: tuple[Tensor, Tensor], energy: Tensor
    ) -> None:
        """Computes the full inner products, in one walk over the rows.

        Args:
            rows: Those to fit to, and those to check on.
            queries: All queries.
            split: Positions of the queries to fit to, and of those to check on.
            energy: Second moments times n.
        """
        self._queries, self.energy = queries, energy
        self.fit, self.held_out = (self._pairs(*pair) for pair in zip(rows, split, strict=True))

    def gain(self, weights: Tensor, positions: Tensor, part: Part, queries: Tensor) -> Tensor:
        """Gradient of a batch's mean correlation with respect to the weights w = m^2.

        Args:
            weights: w ``(p,)``.
            positions: Of the batch's rows among the rows of `fit`.
            part: Their columns.
            queries: Positions among the queries of `fit`.

        Returns:
            float32 ``(p,)``.
        """
        chosen = self.fit.queries[queries]
        masked = self._products(chosen, part, weights)
        full = self.fit.full.index_select(0, queries).index_select(1, positions)
        _, slope = pearson_gradient(full, masked)
        return self._pulled_back(slope, chosen, part)

    def alignment(self) -> Tensor:
        """Covariance of every coordinate's own products with the full ones, which are first normalised by query.

        The first-order gain of letting a coordinate into an empty mask; one walk over the rows to fit to.

        Returns:
            float64 ``(p,)``.
        """
        full = self.fit.full.to(torch.float64)
        centred = full - full.mean(dim=1, keepdim=True)
        centred /= centred.norm(dim=1, keepdim=True).square().clamp(min=torch.finfo(torch.float64).tiny)
        centred[~has_variation(full)] = 0.0
        total = torch.zeros_like(self.energy)
        for positions, part in self.fit.rows.batches(_CHUNK, torch.arange(self.fit.rows.n)):
            total += self._pulled_back(centred.index_select(1, positions), self.fit.queries, part)
        return total

    def check(self, indices: Tensor) -> Tensor:
        """Spearman correlation of the hard mask by held-out query, float64; queries without an order are left out."""
        pairs = self.held_out
        left = self._queries.columns(indices)[pairs.queries]
        masked = left @ pairs.rows.columns(indices).mT
        usable = has_variation(pairs.full)
        return spearman_rows(pairs.full[usable], masked[usable]) if bool(usable.any()) else torch.zeros(1)

    def _pairs(self, rows: Rows, queries: Tensor) -> Pairs:
        full = torch.empty(len(queries), rows.n, device=self.energy.device)
        for positions, part in rows.batches(_CHUNK, torch.arange(rows.n)):
            full[:, positions] = self._products(queries, part, None)
        return Pairs(rows, queries, full)

    def _products(self, queries: Tensor, part: Part, weights: Tensor | None) -> Tensor:
        total: Tensor | float = 0.0
        for columns in column_blocks(len(self.energy)):
            left = self._queries.part(queries, columns)
            if weights is not None:
                left *= weights[columns]
            total = total + left @ part(columns).mT
        return torch.as_tensor(total)

    def _pulled_back(self, slope: Tensor, queries: Tensor, part: Part) -> Tensor:
        """Gradient with respect to w from the one ``(queries, rows)`` with respect to the products."""
        # The slope is made of ordinary size for the products in float32, whatever the size of the gradients.
        largest = float(slope.abs().max()) or 1.0
        slope = (slope / largest).to(torch.float32)
        gain = torch.empty(len(self.energy), device=self.energy.device)
        for columns in column_blocks(len(gain)):
            gain[columns] = ((slope @ part(columns)) * self._queries.part(queries, columns)).sum(dim=0)
        return gain.mul_(largest)


def prepare(
    source: GradientSource,
    queries: GradientSource | None,
    *,
    seed: int,
    name: str,
    cache_bytes: int,
    cache_folder: str | Path | None,
) -> Problem:
    """Splits rows and queries, and keeps what is read often; arguments as in `learn`.

    Raises:
        UsageError: There are too few rows or queries, a gradient is not finite, or all are zero.
    """
    pool = source if queries is None else queries
    n_query = min(MAX_QUERIES, pool.n if queries is not None else max(2, pool.n // 5))
    n_rows = source.n if queries is not None else source.n - n_query
    if n_query < 2 or n_rows < 3:
        raise UsageError(
            f"there are {source.n} gradients and {'no' if queries is None else queries.n} queries; a learned mask "
            "needs at least 3 training samples and 2 queries (5 samples, where queries are taken from them)"
        )
    device = source.device
    order = Stream(seed, name, "mask/queries").permutation(pool.n).to(device)
    chosen = order[:n_query]
    numbers = order[n_query:] if queries is None else Stream(seed, name, "mask/rows").permutation(source.n).to(device)
    n_checked = min(n_rows // 5, _MOST_HELD_OUT) if n_rows >= _FEWEST_TO_SPLIT else 0
    checked, fitted = numbers[:n_checked].sort().values, numbers[n_checked:].sort().values
    energy = torch.zeros(source.p, dtype=torch.float64, device=device)

    def add(block: Tensor) -> None:
        add_squares(energy, block)

    matrix = source.rows
    walked = matrix is None and 2 * source.n * source.p > cache_bytes and cache_folder is None
    if matrix is not None or (walked and queries is not None):
        for block in source:
            add(block)
    elif not walked:
        matrix = hold(source, torch.arange(source.n, device=device), add, folder=cache_folder)
    held = pool.rows if queries is not None or matrix is None else matrix
    if held is None:
        chosen = chosen.sort().values
        held = hold(pool, chosen, add if queries is None else _ignore)
        chosen = torch.arange(n_query, device=device)
    check_nonzero(energy)
    rows = [_rows(source, matrix, kept) for kept in (fitted, checked if n_checked else fitted)]
    scale = float(energy.mean() / source.n) ** -0.5
    n_held = max(1, n_query // 4)
    split = Stream(seed, name, "mask/held_out").permutation(n_query).to(device)
    return Problem(
        (rows[0], rows[1]), HeldRows(held, chosen, scale), (split[n_held:].sort().values, split[:n_held]), energy
    )


def _rows(source: GradientSource, matrix: Tensor | None, numbers: Tensor) -> Rows:
    if matrix is not None:
        return HeldRows(matrix, numbers)
    places = torch.full((source.n,), -1, dtype=torch.int64, device=source.device)
    places[numbers] = torch.arange(len(numbers), device=source.device)
    return WalkedRows(source, places)


def _ignore(block: Tensor) -> None:
    del block
