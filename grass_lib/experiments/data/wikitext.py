"""WikiText-2 (Merity et al.) as blocks of GPT-2 tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.blocks import TextBlocks, blocks_hash, cut_blocks
from grass_lib.experiments.data.sources import grass_data
from grass_lib.experiments.data.tokenizers import Tokenizer, gpt2_tokenizer

HUB = "Salesforce/wikitext"
OFFICIAL, SUBSTITUTE = "wikitext-2-raw-v1", "validation+test"
CHOICES = (OFFICIAL, SUBSTITUTE)
"""The paper's data, and what stands in for them where the training split cannot be had."""
LENGTH = 512
# The substitute is defined on the version with rare words as <unk>, whose splits give other numbers of blocks.
_HUB_NAMES = {OFFICIAL: "wikitext-2-raw-v1", SUBSTITUTE: "wikitext-2-v1"}
_SPLITS = {OFFICIAL: ("train", "validation"), SUBSTITUTE: ("validation", "test")}
# Blocks of 512 that each split must give.
_COUNTS = {OFFICIAL: {"train": 4656, "validation": 481}, SUBSTITUTE: {"validation": 502, "test": 574}}
_TRAIN_TEST_BLOCKS = 374
SIZES = {OFFICIAL: (4656, 481), SUBSTITUTE: (502 + _TRAIN_TEST_BLOCKS, 574 - _TRAIN_TEST_BLOCKS)}
"""Training blocks and queries by data."""
_TITLE = re.compile(r"= (?!=)(.+?)(?<!=) =")


def load_wikitext(data: str = OFFICIAL) -> TextBlocks:
    """Blocks of 512 tokens of WikiText-2, from ``GRASS_DATA/wikitext2`` where that variable is set, else from the hub.

    ``wikitext-2-raw-v1``: 4,656 training blocks and 481 validation blocks as queries. ``validation+test``, which is not
    the paper's training set: the 502 blocks of the validation split and the first 374 of the test split to train on,
    the last 200 of the test split as queries (an article may have blocks on both sides of that cut).

    Raises:
        UsageError: ``data`` is another word.
        DataError: The data are missing, damaged or give another number of blocks.
    """
    check_data(data)
    tokenizer = gpt2_tokenizer()
    first, second = _SPLITS[data]
    rows = {split: _rows(data, split) for split in (first, second)}
    blocks, titles = {}, {}
    for split, texts in rows.items():
        blocks[split], titles[split] = titled_blocks(texts, tokenizer, LENGTH)
        wanted = _COUNTS[data][split]
        if len(blocks[split]) != wanted:
            raise DataError(
                f"WikiText-2, split {split} gives {len(blocks[split])} blocks of {LENGTH} tokens; expected {wanted}. "
                + _remedy(data)
            )
    train, queries = blocks[first], blocks[second]
    train_titles, query_titles = titles[first], titles[second]
    if data == SUBSTITUTE:
        n = _TRAIN_TEST_BLOCKS
        train, queries = torch.cat([train, queries[:n]]), queries[n:]
        train_titles, query_titles = [*train_titles, *query_titles[:n]], query_titles[n:]
    raw = not any("<unk>" in text for texts in rows.values() for text in texts)
    place = f"{HUB}, {_HUB_NAMES[data]} on the hub" if grass_data() is None else "GRASS_DATA/wikitext2"
    note = "" if data == OFFICIAL else ", the training split left out"
    return TextBlocks(
        train_ids=train,
        query_ids=queries,
        base_ids=train,
        train_titles=tuple(train_titles),
        query_titles=tuple(query_titles),
        tokenizer=tokenizer,
        source=f"{place}: splits {first} and {second}{note}{'' if raw else ', rare words as <unk>'}",
        kind="official" if data == OFFICIAL and raw else "substitute",
        rows=sum(map(len, rows.values())),
        sha256=blocks_hash(train, queries),
    )


def titled_blocks(
    rows: Sequence[str], tokenizer: Tokenizer, length: int, first_title: str = ""
) -> tuple[Tensor, list[str]]:
    """Blocks of some rows of text, and the article of each one's middle token.

    Args:
        rows: Lines; a heading ``= Title =`` begins an article.
        tokenizer: From text to tokens.
        length: Tokens in a block.
        first_title: Of rows before the first heading.
    """
    blocks, owners = cut_blocks(tokenizer.encode_rows(rows), length)
    titles, current = [], first_title
    for row in rows:
        found = _TITLE.fullmatch(row.strip())
        current = found[1] if found else current
        titles.append(current)
    return blocks, [titles[owner] for owner in owners]


def check_data(data: str) -> None:
    """Raises UsageError for data that there are not."""
    if data not in CHOICES:
        raise UsageError(f"data is {data!r}; expected one of {', '.join(CHOICES)}")


def wikitext_problems(data: str) -> list[str]:
    """What keeps the data from being read here, one sentence each; asks nothing of the network.

    Raises:
        UsageError: ``data`` is another word.
    """
    check_data(data)
    folder = grass_data()
    for name in ("datasets",) if folder is None else ("pyarrow",):
        if importlib.util.find_spec(name) is None:
            return [f"reading WikiText-2 needs {name}, not installed here; run `make setup`"]
    if folder is None:
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            return [
                "GRASS_DATA is not set and HF_HUB_OFFLINE is on; set GRASS_DATA to a folder with wikitext2/*.parquet"
            ]
        return []
    missing = [f"wikitext2/{path.name}" for path in _paths(folder, data) if not path.is_file()]
    return [f"GRASS_DATA has no {' and no '.join(missing)}; {_remedy(data)}"] if missing else []


def wikitext_fingerprint() -> str:
    """A hash of the splits in ``GRASS_DATA``, those that there are; the hub's copy is fixed and has its name.

    Raises:
        DataError: There is no split, or a file cannot be read.
    """
    folder = grass_data()
    if folder is None:
        return f"hub:{HUB}"
    paths = sorted((folder / "wikitext2").glob("*-00000-of-00001.parquet"))
    if not paths:
        raise DataError(f"GRASS_DATA has no wikitext2/*.parquet; expected the parquet files of {HUB} on the hub")
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise DataError(f"{path} could not be read: {error.strerror or error}; make it readable") from error
    return digest.hexdigest()


def _remedy(data: str) -> str:
    if data == OFFICIAL:
        return (
            f"put the files of {HUB} ({_HUB_NAMES[data]}) there, or run with -p data={SUBSTITUTE} -p base=scratch, "
            "which is not the paper's training set"
        )
    return f"put the files of {HUB} ({_HUB_NAMES[data]}) there, or unset GRASS_DATA to use the hub"


def _paths(folder: Path, data: str) -> list[Path]:
    return [folder / "wikitext2" / f"{split}-00000-of-00001.parquet" for split in _SPLITS[data]]


def _rows(data: str, split: str) -> list[str]:
    folder = grass_data()
    if folder is None:
        return _hub_rows(_HUB_NAMES[data], split)
    path = folder / "wikitext2" / f"{split}-00000-of-00001.parquet"
    if not path.is_file():
        raise DataError(f"GRASS_DATA has no wikitext2/{path.name}; {_remedy(data)}")
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError("reading WikiText-2 needs pyarrow, not installed here; run `make setup`") from error
    try:
        return [str(text) for text in read_table(path, columns=["text"]).column("text").to_pylist()]
    except (ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(
            f"GRASS_DATA's wikitext2/{path.name} cannot be read ({' '.join(str(error).split())}); expected a parquet "
            f"file of {HUB} on the hub with a column text. Fetch it again"
        ) from error


def _hub_rows(name: str, split: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("reading WikiText-2 needs datasets, not installed here; run `make setup`") from error
    try:
        rows: Any = load_dataset(HUB, name, split=split)
        return [str(text) for text in rows["text"]]
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"WikiText-2 could not be read from the hub ({HUB}, {name}): {type(error).__name__}: {error}. Set "
            f"GRASS_DATA to a folder that has wikitext2/{split}-00000-of-00001.parquet, or run with scale=embedded"
        ) from error
