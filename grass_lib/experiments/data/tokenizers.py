"""Byte-level BPE: GPT-2's own, or a small one trained on a few articles."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grass_lib.errors import DataError
from grass_lib.experiments.data.sources import grass_data

HUB = "openai-community/gpt2"
GPT2_ENTRIES = 50257
_FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """From text to tokens and back, without special tokens.

    Attributes:
        name: For people.
        size: Entries of the vocabulary.
    """

    name: str
    size: int
    _engine: Any

    def encode(self, text: str) -> list[int]:
        """Tokens of one text."""
        return list(self._engine.encode(text, add_special_tokens=False).ids)

    def encode_rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, computed together."""
        return [list(found.ids) for found in self._engine.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens; bytes that are no whole character at either end become U+FFFD."""
        return str(self._engine.decode(list(ids), skip_special_tokens=False))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer from ``GRASS_DATA/gpt2``, else from the hub.

    Raises:
        DataError: The files are missing or are not GPT-2's.
    """
    folder = gpt2_files()
    paths = [_hub_file(name) for name in _FILES] if folder is None else [folder / name for name in _FILES]
    from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer

    try:
        engine = ByteLevelBPETokenizer.from_file(str(paths[0]), str(paths[1]))
        size = engine.get_vocab_size()
    except Exception as error:  # the package raises bare Exceptions
        raise DataError(
            f"GPT-2's tokenizer files {paths[0].name} and {paths[1].name} cannot be read ({error}); expected those of "
            f"{HUB} on the hub. Fetch them again"
        ) from error
    if size != GPT2_ENTRIES:
        raise DataError(
            f"GPT-2's {paths[0].name} has {size:,} entries; expected the {GPT2_ENTRIES:,} of {HUB} on the hub. Fetch "
            "it again"
        )
    return Tokenizer("GPT-2's byte-level BPE", size, engine)


def gpt2_files() -> Path | None:
    """The folder of ``GRASS_DATA`` that has GPT-2's tokenizer files; None where they come from the hub."""
    data = grass_data()
    if data is None or not all((data / "gpt2" / name).is_file() for name in _FILES):
        return None
    return data / "gpt2"


def tokenizer_problems() -> list[str]:
    """What keeps GPT-2's tokenizer from being read here, one sentence each; asks nothing of the network."""
    if importlib.util.find_spec("tokenizers") is None:
        return ["cutting text into tokens needs tokenizers, not installed here; run `make setup`"]
    if gpt2_files() is not None:
        return []
    if importlib.util.find_spec("huggingface_hub") is None:
        return ["fetching GPT-2's tokenizer needs huggingface_hub, not installed here; run `make setup`"]
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return [
            "HF_HUB_OFFLINE is on and GRASS_DATA names no folder with gpt2/vocab.json and gpt2/merges.txt; put these "
            f"files of {HUB} there"
        ]
    return []


def tokenizer_fingerprint() -> str:
    """A hash of GPT-2's tokenizer files; the hub's copy is fixed and has its name."""
    folder = gpt2_files()
    if folder is None:
        return f"hub:{HUB}"
    try:
        digests = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in _FILES]
    except OSError as error:
        raise DataError(f"{error.filename} could not be read: {error.strerror}; make it readable") from error
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def train_tokenizer(texts: Iterator[str], size: int) -> Tokenizer:
    """A byte-level BPE trained on some texts; the same texts give the same tokens.

    Args:
        texts: What to train on.
        size: Entries of the vocabulary: 256 bytes and the merges.

    Raises:
        DataError: The package is missing, or the texts do not give so many entries.
    """
    try:
        from tokenizers.implementations.byte_level_bpe import ByteLevelBPETokenizer
    except ImportError as error:
        raise DataError("cutting text into tokens needs tokenizers, not installed here; run `make setup`") from error
    engine = ByteLevelBPETokenizer()
    engine.train_from_iterator(texts, vocab_size=size, min_frequency=2, show_progress=False)
    found = engine.get_vocab_size()
    if found != size:
        raise DataError(f"the texts gave a vocabulary of {found} entries; expected {size}. Give more text")
    return Tokenizer(f"byte-level BPE of {size:,} entries trained on the articles", size, engine)


def _hub_file(name: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DataError(
            "fetching GPT-2's tokenizer needs huggingface_hub, not installed here; run `make setup`"
        ) from error
    try:
        return Path(hf_hub_download(HUB, name))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"GPT-2's {name} could not be had from the hub ({HUB}): {type(error).__name__}: {error}. Set GRASS_DATA to "
            "a folder that has gpt2/vocab.json and gpt2/merges.txt, or run with scale=embedded"
        ) from error
