"""Eigenvectors of a layer's empirical Fisher matrix: every damping value then costs a product, not a factorisation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from grass_lib.attribution.curvature import Curvature, groups_within, layer_rows, slices, stream_curvature
from grass_lib.errors import GrassError
from grass_lib.store import Store
from grass_lib.streams import on_streams

Precision = Literal["float32", "mixed", "float64"]
PRECISIONS: dict[Precision, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.float64),
    "float64": (torch.float64, torch.float64),
}
"""Types of sums and products, and of the decomposition."""

_ROW_BYTES = 2**28
_STREAMS = 4
_TOGETHER_BYTES = 2**30
_COPIES = 6  # of a matrix in float64, while it is decomposed

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerBasis:
    """Eigenvalues and eigenvectors of ``F = G^T G / n`` that are not zero.

    A layer that no sample used has none of them, and contributes 0 to every score.

    Attributes:
        vectors: ``(k, r)``.
        values: ``(r,)`` float64, at least 0.
        mean: The mean eigenvalue ``tr(F) / k``, zeros included; relative damping multiplies it.
        residual: Largest ``|F v - s v|`` over the largest eigenvalue: what the decomposition leaves undone.
    """

    vectors: Tensor
    values: Tensor
    mean: float
    residual: float

    def precondition(self, queries: Tensor, damping: Sequence[float]) -> Tensor:
        """``(F + d mean I)^-1 q`` for every query and damping value, as far as training rows can see it.

        Args:
            queries: ``(m, k)`` in the dtype of ``vectors``.
            damping: Values above 0.

        Returns:
            ``(len(damping), m, k)``.
        """
        rotated = queries @ self.vectors
        result = queries.new_empty(len(damping), *queries.shape)
        for place, weights in enumerate(self._weights(damping)):
            torch.mm(rotated * weights, self.vectors.mT, out=result[place])
        return result

    def self_influence(self, rows: Tensor, damping: Sequence[float]) -> Tensor:
        """``g . (F + d mean I)^-1 g`` of training rows.

        Args:
            rows: ``(n, k)`` in the dtype of ``vectors``.
            damping: Values above 0.

        Returns:
            ``(len(damping), n)``.
        """
        squares = (rows @ self.vectors).square_()
        return torch.stack([squares @ weights for weights in self._weights(damping)])

    def resolves(self, damping: float) -> bool:
        """Whether a damping value stands out from the rounding of the largest eigenvalue, in the vectors' dtype."""
        largest = float(self.values.max()) if len(self.values) else 0.0
        return damping * self.mean >= largest * torch.finfo(self.vectors.dtype).eps

    def _weights(self, damping: Sequence[float]) -> list[Tensor]:
        return [(1.0 / (self.values + value * self.mean)).to(self.vectors.dtype) for value in damping]


def decompose(
    store: Store,
    layers: Sequence[str],
    curvature: Curvature | None,
    device: torch.device,
    *,
    solve: torch.dtype,
    keep: torch.dtype,
) -> dict[str, LayerBasis]:
    """Eigenvectors of layers of a complete store.

    Args:
        store: The store.
        layers: Names of the layers wanted.
        curvature: Its sums, which are used up; None reads the store.
        device: Where to compute.
        solve: Type of the decomposition.
        keep: Type of sums and vectors.

    Raises:
        GrassError: Sums of squares overflowed.
        StoreError: A shard is missing, damaged or cannot be read.
    """
    primal = primal_layers(store)
    if curvature is None:
        curvature = stream_curvature(store, [name for name in layers if name in primal], device, keep)
    sums, bases = curvature.sums, dict[str, LayerBasis]()

    def from_sums(name: str) -> LayerBasis:
        return primal_basis(name, sums.pop(name), store.n_samples, dtype=solve, keep=keep)

    def from_rows(name: str) -> LayerBasis:
        return dual_basis(name, rows.pop(name), keep=keep)

    own = [name for name in layers if name in primal]
    bases.update(_side_by_side(from_sums, own, max((primal[name] for name in own), default=0), device))
    bytes_of = {name: store.n_samples * k * store.row_dtype.itemsize for name, k in store.layers.items()}
    for group in groups_within((name for name in layers if name not in primal), bytes_of.__getitem__, _ROW_BYTES):
        rows = layer_rows(store, group, device)
        bases.update(_side_by_side(from_rows, group, store.n_samples, device))
    bases = {name: bases[name] for name in layers}
    if store.basis is not None:
        # Relative to what the rows were before, so that a value means the same whatever the rank.
        bases = {name: replace(basis, mean=store.basis.means[name]) for name, basis in bases.items()}
    return bases


def _side_by_side(
    work: Callable[[str], LayerBasis], names: Sequence[str], width: int, device: torch.device
) -> dict[str, LayerBasis]:
    """Decompositions of matrices up to a width; small ones alone would leave most of a GPU idle."""
    at_once = _TOGETHER_BYTES // (_COPIES * 8 * max(1, width) ** 2)
    return dict(zip(names, on_streams(work, names, device, max(1, min(_STREAMS, at_once))), strict=True))


def primal_layers(store: Store) -> dict[str, int]:
    """Sizes of the layers that have at most as many features as there are samples."""
    return {name: size for name, size in store.layers.items() if size <= store.n_samples}


def primal_basis(name: str, total: Tensor, n: int, *, dtype: torch.dtype, keep: torch.dtype) -> LayerBasis:
    """From the sum ``G^T G``.

    Args:
        name: Of the layer, for errors.
        total: ``(k, k)``.
        n: Number of rows in it.
        dtype: Of the decomposition.
        keep: Of the vectors that are kept.

    Raises:
        GrassError: The sum overflowed.
    """
    matrix = total.to(dtype) / n
    mean = _trace(name, matrix) / len(matrix)
    if mean == 0.0:
        return _empty(len(matrix), keep, total.device)
    values, vectors = _eigenvectors(name, matrix)
    residual = _residual(matrix, values, vectors)
    return LayerBasis(vectors.to(keep), values.double().clamp_(min=0.0), mean, residual)


def dual_basis(name: str, rows: Tensor, *, keep: torch.dtype) -> LayerBasis:
    """From the rows themselves, where there are fewer of them than features.

    With ``G G^T / n = U S U^T`` the eigenvectors are ``V = G^T U / sqrt(n S)``. They span what all rows span, so that
    scores of these rows are exact. Always in float64: dividing by small eigenvalues asks for it, and the matrix is the
    smaller one.

    Args:
        name: Of the layer, for errors.
        rows: All rows ``(n, k)``.
        keep: Of the vectors that are kept.

    Raises:
        GrassError: The products overflowed.
    """
    (n, k), dtype = rows.shape, torch.float64
    matrix = torch.zeros(n, n, dtype=dtype, device=rows.device)
    portions = list(slices(k, n * dtype.itemsize))
    for columns in portions:
        part = rows[:, columns].to(dtype)
        matrix.addmm_(part, part.mT)
    matrix /= n
    mean = _trace(name, matrix) / k
    if mean == 0.0:
        return _empty(k, keep, rows.device)
    values, left = _eigenvectors(name, matrix)
    residual = _residual(matrix, values, left)
    kept = values > torch.finfo(dtype).eps * float(values[-1]) * max(n, k)
    values, left = values[kept], left[:, kept]
    left /= (n * values).sqrt()
    vectors = torch.empty(k, len(values), dtype=keep, device=rows.device)
    for columns in portions:
        vectors[columns] = (rows[:, columns].to(dtype).mT @ left).to(keep)
    return LayerBasis(vectors, values.double(), mean, residual)


def warn_unresolved(bases: Sequence[LayerBasis], damping: Sequence[float]) -> None:
    """Logs damping values that rounding may drown: a warning for one value, a note for a grid to choose from."""
    for value in damping:
        count = sum(not basis.resolves(value) for basis in bases)
        if count:
            _log.log(
                logging.INFO if len(damping) > 1 else logging.WARNING,
                "A damping of %g is below what %s resolves beside the largest eigenvalue of %d of %d layers; scores "
                "hold visible rounding errors. Use a larger damping or precision='float64'.",
                value,
                bases[0].vectors.dtype,
                count,
                len(bases),
            )


def _trace(name: str, matrix: Tensor) -> float:
    trace = float(matrix.diagonal().double().sum())
    if not trace < float("inf"):
        raise GrassError(
            f"The sum of squares of layer {name} overflows {matrix.dtype}; a store may be damaged (`grass store "
            "verify` tells), or its rows too large: scale the loss down, or use precision='float64'."
        )
    return trace


def _eigenvectors(name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise GrassError(
            f"The curvature of layer {name} could not be decomposed ({error}); look at its gradients, or leave it out "
            "of layers="
        ) from error


def _residual(matrix: Tensor, values: Tensor, vectors: Tensor) -> float:
    difference = matrix @ vectors
    difference -= vectors * values
    return float(difference.norm(dim=0).max() / values[-1])


def _empty(k: int, dtype: torch.dtype, device: torch.device) -> LayerBasis:
    vectors = torch.empty(k, 0, dtype=dtype, device=device)
    return LayerBasis(vectors, torch.empty(0, dtype=torch.float64, device=device), 0.0, 0.0)
