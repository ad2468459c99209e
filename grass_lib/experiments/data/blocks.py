"""Text as blocks of tokens: rows are tokenised, concatenated in groups and cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.experiments.data.tokenizers import Tokenizer

GROUP = 1000
"""Rows that are concatenated before they are cut; what is left of a group is dropped (section 7.4 of the protocol)."""


@dataclass(frozen=True, eq=False)
class TextBlocks:
    """Blocks of tokens of one scale; labels are the inputs.

    Attributes:
        train_ids: Blocks to fine-tune on, int64 ``(n_train, length)``.
        query_ids: Queries, int64 ``(n_query, length)``.
        base_ids: Blocks that a base model is trained on from scratch, int64 ``(n_base, length)``.
        train_titles: Article that most likely fills each training block: that of its middle token.
        query_titles: Likewise for the queries.
        tokenizer: From text to tokens and back.
        source: Where the text comes from, in words.
        kind: ``official``, ``substitute`` or ``embedded``.
        rows: Rows of text read.
        sha256: Of all blocks.
    """

    train_ids: Tensor
    query_ids: Tensor
    base_ids: Tensor
    train_titles: tuple[str, ...]
    query_titles: tuple[str, ...]
    tokenizer: Tokenizer
    source: str
    kind: str
    rows: int
    sha256: str

    @property
    def length(self) -> int:
        """Tokens in a block."""
        return self.train_ids.shape[1]

    def passage(self, index: int) -> str:
        """Text of a training block.

        Args:
            index: Which, from 0.

        Raises:
            UsageError: There is no such block.
        """
        if not 0 <= index < len(self.train_ids):
            raise UsageError(f"training block {index} was asked for; expected 0 to {len(self.train_ids) - 1}")
        return self.tokenizer.decode(self.train_ids[index].tolist())


def cut_blocks(rows: Sequence[Sequence[int]], length: int, group: int = GROUP) -> tuple[Tensor, list[int]]:
    """Concatenates the tokens of each group of rows and cuts them, dropping each group's remainder.

    Args:
        rows: Tokens of each row of text.
        length: Tokens in a block.
        group: Rows in a group; the last one may have fewer.

    Returns:
        Blocks int64 ``(n, length)``, and for each the row that its middle token comes from.

    Raises:
        UsageError: ``length`` or ``group`` is below 1.
    """
    if length < 1 or group < 1:
        raise UsageError(f"blocks of {length} tokens from groups of {group} rows; expected 1 or more of each")
    blocks: list[Tensor] = []
    owners: list[int] = []
    for start in range(0, len(rows), group):
        part = rows[start : start + group]
        ends = torch.tensor(list(accumulate(len(row) for row in part)))
        count = int(ends[-1]) // length
        tokens = torch.tensor([token for row in part for token in row], dtype=torch.int64)
        blocks.append(tokens[: count * length].view(count, length))
        middles = torch.arange(count) * length + length // 2
        owners += (torch.searchsorted(ends, middles, right=True) + start).tolist()
    return (torch.cat(blocks) if blocks else torch.empty((0, length), dtype=torch.int64)), owners


def blocks_hash(*parts: Tensor) -> str:
    """SHA-256 of blocks and their shapes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(tuple(part.shape)).encode())
        digest.update(part.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
