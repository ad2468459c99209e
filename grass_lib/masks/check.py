"""How well a mask keeps the order of training samples by inner product."""

from __future__ import annotations

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.masks.objective import has_variation, spearman_rows
from grass_lib.masks.source import GradientSource, as_source, check_request


def hard_mask_correlation(
    source: GradientSource | Tensor, queries: GradientSource | Tensor, indices: Tensor
) -> tuple[float, Tensor]:
    """Spearman correlation over training samples between full inner products and those of the kept coordinates.

    One walk over the rows. Holds the queries, ``4 q p`` bytes, and a block.

    Args:
        source: Gradients of training samples ``(n, p)``.
        queries: Gradients of queries ``(q, p)``, which the mask should not have seen.
        indices: int64 ``(k,)``, the kept coordinates.

    Returns:
        The mean over queries and float64 ``(q,)``. A query whose full inner products are all equal is NaN and does not
        count; one whose masked products are all equal has 0.

    Raises:
        UsageError: Rows and queries do not fit each other or the indices, a gradient is not finite, or no query counts.
    """
    rows, asked = as_source(source), as_source(queries)
    check_request(rows, len(indices), asked)
    if int(indices.min()) < 0 or int(indices.max()) >= rows.p:
        raise UsageError(
            f"indices run from {int(indices.min())} to {int(indices.max())}; expected 0 to {rows.p - 1} (p is {rows.p})"
        )
    left = torch.cat([block.to(torch.float32, copy=True) for block in asked])
    left /= left.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    indices = indices.to(left.device)
    kept = left[:, indices]
    full, masked = (torch.empty(asked.n, rows.n, device=left.device) for _ in range(2))
    seen = 0
    for block in rows:
        block = block.to(torch.float32)
        part = slice(seen, seen + len(block))
        full[:, part] = left @ block.mT
        masked[:, part] = kept @ block[:, indices].mT
        seen += len(block)
    counts = has_variation(full)
    if not bool(counts.any()):
        raise UsageError("every query has the same inner product with all samples; there is no order to keep")
    found = spearman_rows(full, masked)
    found[~counts] = torch.nan
    return float(found[counts].mean()), found
