"""Inner products of layer gradients that are held as thin factors, and their gradients with respect to both masks.

With G_i = L_i^T R_i, ``<G_i, G_j> = sum_{t,s} (l_it . l_js)(r_it . r_js)``; masks m on both samples weight the
coordinates of each side by w = m^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.masks.objective import has_variation, pearson_gradient, spearman_rows

# Elements of a block of products between tokens.
_BLOCK = 1 << 24


@dataclass(frozen=True, eq=False)
class Factors:
    """Gradients of some samples at one layer.

    Attributes:
        left: Output side ``(n, r, d_out)``.
        right: Input side ``(n, r, d_in)``.
    """

    left: Tensor
    right: Tensor

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.left)

    def at(self, numbers: Tensor) -> Factors:
        """Some of the samples."""
        numbers = numbers.to(self.left.device)
        return Factors(self.left[numbers], self.right[numbers])

    def kept(self, outputs: Tensor, inputs: Tensor) -> Factors:
        """Some coordinates of both sides."""
        device = self.left.device
        return Factors(self.left[:, :, outputs.to(device)], self.right[:, :, inputs.to(device)])


def inner_products(a: Factors, b: Factors) -> Tensor:
    """``(a.n, b.n)``, in blocks of a's samples."""
    rows = max(1, _BLOCK // max(1, a.left.shape[1] * b.n * b.left.shape[1]))
    left, right = b.left.flatten(0, 1).mT, b.right.flatten(0, 1).mT
    parts = []
    for some, others in zip(a.left.split(rows), a.right.split(rows), strict=True):
        product = (some.flatten(0, 1) @ left).mul_(others.flatten(0, 1) @ right)
        parts.append(product.view(len(some), a.left.shape[1], b.n, b.left.shape[1]).sum(dim=(1, 3)))
    return torch.cat(parts)


def correlation_gain(a: Factors, b: Factors, full: Tensor, weights: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of the mean Pearson correlation between full and weighted products with respect to both weights.

    Args:
        a: Queries.
        b: Samples.
        full: Their full inner products ``(a.n, b.n)``.
        weights: w of the output side ``(d_out,)`` and of the input side ``(d_in,)``.

    Returns:
        ``(d_out,)`` and ``(d_in,)``.
    """
    shape = a.n, a.left.shape[1], b.n, b.left.shape[1]
    outputs = (a.left * weights[0]).flatten(0, 1) @ b.left.flatten(0, 1).mT
    inputs = (a.right * weights[1]).flatten(0, 1) @ b.right.flatten(0, 1).mT
    masked = (outputs * inputs).view(shape).sum(dim=(1, 3))
    slope = pearson_gradient(full, masked)[1]
    # Made of ordinary size for the products in float32, whatever the size of the gradients.
    largest = slope.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    slope = (slope / largest).to(outputs.dtype)[:, None, :, None]
    outputs, inputs = ((part.view(shape) * slope).flatten(2).flatten(0, 1) for part in (outputs, inputs))
    of_left = ((inputs @ b.left.flatten(0, 1)) * a.left.flatten(0, 1)).sum(dim=0)
    of_right = ((outputs @ b.right.flatten(0, 1)) * a.right.flatten(0, 1)).sum(dim=0)
    return of_left * largest, of_right * largest


class Pairs:
    """Queries and samples with their full inner products; where both are the same, no sample meets itself.

    Attributes:
        queries: Gradients of queries.
        samples: Gradients of training samples.
        full: Inner products ``(queries.n, samples.n)``.
        alone: Whether the samples are their own queries.
    """

    def __init__(self, queries: Factors | None, samples: Factors) -> None:
        """Computes the full inner products.

        Args:
            queries: None for the samples themselves.
            samples: Of training.
        """
        self.alone = queries is None
        self.queries, self.samples = samples if queries is None else queries, samples
        self.full = inner_products(self.queries, samples)

    def check(self, outputs: Tensor, inputs: Tensor) -> Tensor:
        """Spearman correlation of a hard mask by query, float64 on the CPU; queries without an order are left out.

        Args:
            outputs: Kept coordinates of the output side.
            inputs: Of the input side.
        """
        masked = inner_products(self.queries.kept(outputs, inputs), self.samples.kept(outputs, inputs))
        full, masked = (self._others(matrix) for matrix in (self.full, masked))
        usable = has_variation(full)
        return spearman_rows(full[usable], masked[usable]).cpu() if bool(usable.any()) else torch.zeros(1)

    def _others(self, products: Tensor) -> Tensor:
        """Without the diagonal where samples are their own queries."""
        if not self.alone:
            return products
        off = ~torch.eye(len(products), dtype=torch.bool, device=products.device)
        return products[off].view(len(products), -1)
