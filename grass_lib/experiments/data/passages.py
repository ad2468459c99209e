"""Passages of text that a language model was, or could have been, trained on: full blocks, or padded documents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.gradients.language import IGNORED


@dataclass(frozen=True, eq=False)
class PassageSet:
    """Training passages in a fixed order.

    Attributes:
        ids: Tokens int64 ``(n, length)``; padding is on the right.
        lengths: Tokens of each passage that are not padding, int64 ``(n,)``.
        titles: What each passage is from, where that is known; else empty.
        text: ``text(index)``: a passage as text.
        source: Where the text comes from, in words.
        kind: ``official``, ``substitute`` or ``embedded``.
        rows: Rows of text read.
        sha256: Of all passages.
    """

    ids: Tensor
    lengths: Tensor
    titles: tuple[str, ...]
    text: Callable[[int], str]
    source: str
    kind: str
    rows: int
    sha256: str

    def __len__(self) -> int:
        """Number of passages."""
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens of all passages, without padding."""
        return int(self.lengths.sum())

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """All passages as batches; padding has labels that do not count.

        Attention is causal and padding is on the right, so that no token sees any: a mask would change nothing.

        Args:
            size: Passages in a batch; the last may have fewer.

        Raises:
            UsageError: ``size`` is below 1.
        """
        if size < 1:
            raise UsageError(f"batches of {size} passages; expected 1 or more")
        return [
            batch_of(ids, lengths) for ids, lengths in zip(self.ids.split(size), self.lengths.split(size), strict=True)
        ]


def batch_of(ids: Tensor, lengths: Tensor, skipped: Tensor | None = None) -> dict[str, Tensor]:
    """A batch whose loss counts the tokens from ``skipped`` to ``lengths`` of each row, and nothing else.

    Args:
        ids: int64 ``(n, length)``.
        lengths: Tokens before the padding, ``(n,)``.
        skipped: Tokens at the beginning that do not count, such as a prompt, ``(n,)``; None for none.
    """
    place = torch.arange(ids.shape[1])
    counts = place < lengths[:, None]
    if skipped is not None:
        counts &= place >= skipped[:, None]
    return {"input_ids": ids, "labels": ids.masked_fill(~counts, IGNORED)}


def padded(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one tensor, padded on the right.

    Args:
        rows: Tokens.
        padding: Token that fills the rest.

    Returns:
        int64 ``(n, longest)``, and the lengths ``(n,)``.

    Raises:
        UsageError: There are no rows, or one is empty.
    """
    if not rows or not all(rows):
        raise UsageError(
            f"{len(rows)} rows of tokens, one of them empty or none at all; expected one token or more in each"
        )
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), padding, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids, lengths
