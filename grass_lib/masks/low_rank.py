"""A sample's gradient of a linear layer as a product of two thin matrices, found without forming it."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(delta: Tensor, x: Tensor, rank: int, start: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``left^T right`` of ``G = delta^T x`` per sample, with at most ``rank`` rows.

    Where a sample has no more tokens than that, its tokens are the factors and nothing is lost. Otherwise a randomised
    range finder with one power iteration (Halko, Martinsson and Tropp, "Finding structure with randomness", 2011,
    algorithm 4.4) works on the tokens alone: nothing of size d_out * d_in is held. Dropping tokens instead would leave
    out whole terms of G; this keeps what is largest in it.

    Args:
        delta: Gradients of the layer's outputs ``(batch, tokens, d_out)``, at least float32.
        x: Inputs ``(batch, tokens, d_in)``.
        rank: Most rows; more than d_out or d_in are never needed.
        start: Random normals ``(d_in, rank)`` or wider.

    Returns:
        ``(batch, r, d_out)`` and ``(batch, r, d_in)``.
    """
    rank = min(rank, delta.shape[2], x.shape[2])
    if delta.shape[1] <= rank:
        return delta, x
    left = _orthonormal(delta.mT @ (x @ start[:, :rank]))
    right = _orthonormal(x.mT @ (delta @ left))
    left = _orthonormal(delta.mT @ (x @ right))
    return left.mT, (delta @ left).mT @ x


def side_energies(delta: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of the rows and columns of ``G = delta^T x`` per sample, from products between tokens.

    Row a has ``delta_a^T K delta_a`` with K = x x^T over tokens, and columns likewise.

    Args:
        delta: ``(batch, tokens, d_out)``, at least float32.
        x: ``(batch, tokens, d_in)``.

    Returns:
        ``(batch, d_out)`` and ``(batch, d_in)``.
    """
    rows = (delta * (x @ x.mT @ delta)).sum(dim=1)
    columns = (x * (delta @ delta.mT @ x)).sum(dim=1)
    return rows.clamp_(min=0.0), columns.clamp_(min=0.0)


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span ``(batch, d, r)``; directions that are not there come out as zero.

    Cholesky QR, shifted and done twice (Fukaya et al., "Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices", 2020): batches of Householder factorisations run one after the other on a GPU, and
    products do not. It is computed in float64, in which the shift is too small to matter.
    """
    found = columns.to(torch.float64)
    found = found / found.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    for _ in range(2):
        gram = found.mT @ found
        trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1, keepdim=True)
        shift = trace * (10 * gram.shape[1] * torch.finfo(torch.float64).eps)
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(trace > 0, shift, 1.0))
        found = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), found.mT, upper=False).mT
    return found.to(columns.dtype)
