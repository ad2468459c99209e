"""OpenWebText in blocks of tokens: from ``GRASS_DATA/openwebtext`` (parquet or JSON lines), else from the hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.blocks import blocks_hash, cut_blocks
from grass_lib.experiments.data.passages import PassageSet
from grass_lib.experiments.data.sources import grass_data
from grass_lib.experiments.data.tokenizers import Tokenizer
from grass_lib.rng import Stream

HUB = "Skylion007/openwebtext"
FOLDER = "openwebtext"
REVISIONS = (None, "refs/convert/parquet")
"""Tried one after the other: `datasets` 4 and later run no loading scripts, the hub's converted files need none."""
_FORMATS = (".parquet", ".jsonl")
_GROUP = 1000
TOKENS_PER_DOCUMENT = 150
"""The protocol reads a document for every 150 tokens that are wanted: half of what a document has on average."""


def load_openwebtext(tokenizer: Tokenizer, *, max_tokens: int, length: int, seed: int, end: int | None) -> PassageSet:
    """Blocks of the first documents, shuffled.

    As the protocol has it: ``max_tokens / 150`` documents are read (more where they are short), concatenated and cut;
    the blocks are shuffled, and the first ``max_tokens // length`` are kept.

    Args:
        tokenizer: Of the model.
        max_tokens: Tokens in all.
        length: Tokens in a block.
        seed: Of the order.
        end: Token after each document; None for none.

    Raises:
        UsageError: ``max_tokens`` is less than one block.
        DataError: The data cannot be had, or give too few blocks.
    """
    wanted = max_tokens // length
    if wanted < 1:
        raise UsageError(f"max_tokens is {max_tokens}; expected at least one block of {length} tokens")
    n_documents = max(1, max_tokens // TOKENS_PER_DOCUMENT)
    documents, source = _documents()
    parts: list[Tensor] = []
    rows = 0
    while rows < n_documents or sum(map(len, parts)) < wanted:
        chunk = list(islice(documents, min(_GROUP, n_documents - rows) if rows < n_documents else _GROUP))
        if not chunk:
            break
        encoded = tokenizer.encode_rows(chunk)
        blocks, _ = cut_blocks([[*row, *([] if end is None else [end])] for row in encoded], length, len(chunk))
        parts.append(blocks)
        rows += len(chunk)
    every = torch.cat(parts) if parts else torch.empty((0, length), dtype=torch.int64)
    if len(every) < wanted:
        raise DataError(
            f"{rows:,} documents of {source} give {len(every):,} blocks of {length} tokens; {wanted:,} were asked for "
            f"with max_tokens={max_tokens:,}. Give more documents, or lower max_tokens"
        )
    # In random order, as the protocol has it: row i of the store is block i of this order.
    ids = every[Stream(seed, "openwebtext", "order").permutation(len(every))[:wanted]]
    return PassageSet(
        ids=ids,
        lengths=torch.full((wanted,), length),
        titles=(),
        text=lambda index: tokenizer.decode(ids[index].tolist()),
        source=source,
        kind="official",
        rows=rows,
        sha256=blocks_hash(ids),
    )


def random_blocks(vocabulary: int, *, max_tokens: int, length: int, seed: int) -> PassageSet:
    """Blocks of random tokens, for measuring speed without text or tokenizer.

    Args:
        vocabulary: Number of tokens.
        max_tokens: Tokens in all.
        length: Tokens in a block.
        seed: Of the tokens.

    Raises:
        UsageError: ``max_tokens`` is less than one block.
    """
    wanted = max_tokens // length
    if wanted < 1:
        raise UsageError(f"max_tokens is {max_tokens}; expected at least one block of {length} tokens")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (wanted, length), generator=generator)
    return PassageSet(
        ids=ids,
        lengths=torch.full((wanted,), length),
        titles=(),
        text=lambda index: f"random tokens {ids[index][:8].tolist()} ...",
        source="random tokens, for throughput only",
        kind="substitute",
        rows=wanted,
        sha256=blocks_hash(ids),
    )


def openwebtext_problems() -> list[str]:
    """What keeps the text from being had here, one sentence each; asks nothing of the network."""
    if local_files():
        return []
    if importlib.util.find_spec("datasets") is None:
        return ["OpenWebText needs the package datasets, not installed here; run `make setup`"]
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return [f"HF_HUB_OFFLINE is on and GRASS_DATA has no {FOLDER}/ with parquet or jsonl files; put them there"]
    return []


def openwebtext_fingerprint() -> str:
    """A hash of the local files' names and sizes; the hub's copy has its name."""
    files = local_files()
    if not files:
        return f"hub:{HUB}"
    listed = [[path.name, path.stat().st_size] for path in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def local_files() -> list[Path]:
    """The text files of ``GRASS_DATA/openwebtext``, in order of their names."""
    data = grass_data()
    folder = None if data is None else data / FOLDER
    if folder is None or not folder.is_dir():
        return []
    return sorted(path for path in folder.rglob("*") if path.suffix in _FORMATS)


def _documents() -> tuple[Iterator[str], str]:
    files = local_files()
    if files:
        return (text for path in files for text in _read(path)), f"GRASS_DATA/{FOLDER} ({len(files)} files)"
    return _from_hub(), f"{HUB} from the hub (CC0, texts of their authors)"


def _read(path: Path) -> Iterator[str]:
    """Texts of a file, a portion in memory at a time."""
    name = f"{FOLDER}/{path.name}"
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                if "text" not in file.schema_arrow.names:
                    raise DataError(
                        f"{name} has the columns {', '.join(file.schema_arrow.names)}; expected one called text"
                    )
                for batch in file.iter_batches(columns=["text"]):
                    yield from batch.column(0).to_pylist()
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row: Any = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise DataError(
                        f'{name}, line {number}: expected an object such as {{"text": "..."}}, not {line[:80]!r}'
                    )
                yield row["text"]
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{name} could not be read ({type(error).__name__}: {error}); expected parquet or JSON lines"
        ) from error


def _from_hub() -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("OpenWebText needs the package datasets, not installed here; run `make setup`") from error
    reasons = []
    for revision in REVISIONS:
        try:
            found: Any = datasets.load_dataset(HUB, split="train", revision=revision, streaming=True)
            return (row["text"] for row in found)
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(f"{revision or 'default revision'}: {type(error).__name__}: {error}")
    raise DataError(
        f"{HUB} could not be had from the hub ({'; '.join(reasons)}). Put parquet or jsonl files with a column text "
        f"into GRASS_DATA's folder {FOLDER}/, or run with scale=embedded"
    )
