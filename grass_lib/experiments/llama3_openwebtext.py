"""Llama-3.1-8B + OpenWebText (section 4.3 of the paper): model, passages, prompts and protocol at both scales.

At the embedded scale the model is SmolLM2-135M, of the same architecture and really pretrained, and the passages are
paragraphs of Wikipedia. There are no retrained models here: what is measured is speed and memory, and what is shown are
the passages that made the model's own answers likelier.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.base import AttributionTask, resolve_device
from grass_lib.experiments.data.documents import load_documents
from grass_lib.experiments.data.openwebtext import (
    load_openwebtext,
    openwebtext_fingerprint,
    openwebtext_problems,
    random_blocks,
)
from grass_lib.experiments.data.passages import PassageSet
from grass_lib.experiments.data.wikipedia import articles_fingerprint
from grass_lib.experiments.llama3_models import ChatModel, hub_tokenizer, smollm2, smollm2_path, tiny_llama
from grass_lib.experiments.llama3_protocol import SCALES, Protocol, parse_phases, protocol
from grass_lib.experiments.llama3_queries import answer, load_prompts, query_batches
from grass_lib.experiments.llama3_results import Results
from grass_lib.experiments.models.llama import (
    HUB,
    SHAPES,
    llama_config,
    llama_folder,
    llama_problems,
    pretrained_llama,
    random_llama,
)
from grass_lib.gradients.fp8 import device_problem
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.gradients.language import IGNORED
from grass_lib.project import runs_root
from grass_lib.specs import parse_hessian
from grass_lib.store.formats import DTYPES

SHAPE = "llama-3.1-8b"
_NEED_MODEL = ("cache", "self_influence", "attribute")


def load_model(protocol: Protocol, device: str, folder: Path, *, with_model: bool = True) -> ChatModel:
    """The model of a protocol.

    Args:
        protocol: Of the scale.
        device: Where it goes.
        folder: Where a tiny model that is trained here is kept.
        with_model: False for the tokenizer alone.

    Raises:
        DataError: It cannot be had.
    """
    if protocol.scale == "embedded":
        chat = smollm2(with_model=with_model) if smollm2_path() else tiny_llama(folder, with_model=with_model)
        if chat.model is not None:
            chat.model.to(device)
        return chat
    if protocol.weights == "random":
        model = random_llama(llama_config(SHAPES[SHAPE]), device=device, dtype=torch.bfloat16) if with_model else None
        note = "random weights, for throughput only: scores and texts mean nothing"
        return ChatModel(model, None, str, (), 0, f"{SHAPE} with random weights", "random", note)
    if with_model:
        model, tokenizer, origin = pretrained_llama(device, torch.bfloat16)
    else:
        import transformers

        folder_here = llama_folder()
        model, origin = None, "tokenizer only"
        tokenizer = transformers.AutoTokenizer.from_pretrained(HUB if folder_here is None else str(folder_here))
    own, chat, stop = hub_tokenizer(tokenizer)
    official = llama_folder() is None
    return ChatModel(
        model=model,
        tokenizer=own,
        chat=chat,
        stop=stop,
        padding=stop[0] if stop else 0,
        name=HUB if official else "the model of GRASS_DATA/llama3",
        weights="official" if official or _is_8b(model) else "substitute",
        note=f"from {origin}, in bfloat16",
    )


def _is_8b(model: Any) -> bool:
    """Whether a local model has Llama-3.1-8B's shape."""
    config, sizes = getattr(model, "config", None), SHAPES[SHAPE]
    found = (
        getattr(config, "hidden_size", 0),
        getattr(config, "num_hidden_layers", 0),
        getattr(config, "vocab_size", 0),
    )
    return found == (sizes.width, sizes.layers, sizes.vocabulary)


def load_passages(protocol: Protocol, chat: ChatModel, seed: int = 0) -> PassageSet:
    """The passages of a protocol, in the order of the gradient store.

    Args:
        protocol: Of the scale.
        chat: Whose tokens they are made of.
        seed: Of the order at paper scale.

    Raises:
        DataError: The text cannot be had.
    """
    if protocol.weights == "random":
        return random_blocks(
            SHAPES[SHAPE].vocabulary, max_tokens=protocol.max_tokens, length=protocol.length, seed=seed
        )
    if chat.tokenizer is None:
        raise UsageError(f"{chat.name} has no tokenizer; expected one to cut text with")
    if protocol.scale == "embedded":
        return load_documents(
            chat.tokenizer, length=protocol.length, per_article=protocol.per_article, padding=chat.padding
        )
    end = chat.stop[0] if chat.stop else None
    return load_openwebtext(chat.tokenizer, max_tokens=protocol.max_tokens, length=protocol.length, seed=seed, end=end)


def layers_of(protocol: Protocol, chat: ChatModel, head: bool) -> str | list[str]:
    """What ``find_layers`` takes: all linear layers of the decoder, or those of its last blocks."""
    return protocol.layers(int(chat.model.config.num_hidden_layers), head)


def results_of(
    root: Path, protocol: Protocol, chat: ChatModel, text: PassageSet, *, fp8: bool = False, **settings: Any
) -> Results:
    """Where the phases of one setting leave their results.

    Args:
        root: Folder for all settings.
        protocol: Of the scale.
        chat: The model.
        text: The passages.
        fp8: Whether the model's products run in FP8: never among the results of others.
        **settings: What else decides the gradients, as JSON values.
    """
    identity = {"model": chat.name, "passages": text.sha256, "length": protocol.length, "scale": protocol.scale}
    products = {"fp8": True} if fp8 else {}  # absent from the identities of before the switch
    return Results(root, {**identity, "last_blocks": protocol.last_blocks, **products, **settings})


def needs_model(phases: tuple[str, ...]) -> bool:
    """Whether a phase among these runs the model; the others read what is on the disk."""
    return any(phase in _NEED_MODEL for phase in phases)


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: By name, of the right types.

    Raises:
        UsageError: A value that cannot work.
        DataError: Model or data cannot be had here.
    """
    chosen = _protocol_of(scale, parameters)
    chosen.compression(parameters["specs"])
    phases = parse_phases(parameters["phase"])
    parse_hessian(parameters["hessian"])
    if parameters["dtype"] not in DTYPES:
        raise UsageError(f"dtype is {parameters['dtype']!r}; expected one of {', '.join(DTYPES)}")
    if parameters["damping"] < 0:
        raise UsageError(f"damping is {parameters['damping']}; expected 0 for the scale's own, or a positive number")
    if chosen.weights == "random" and set(phases) & {"attribute", "retrieve"}:
        raise UsageError(
            f"phase is {parameters['phase']!r} with weights=random, which answer nothing; expected -p phase=cache or "
            "-p phase=cache,self_influence"
        )
    if parameters["n_prompts"]:
        load_prompts(parameters["n_prompts"])
    device = resolve_device(parameters["device"])
    problem = device_problem(torch.device(device)) if parameters["fp8"] else ""
    if problem:
        raise UsageError(f"fp8 is True, and {problem}")
    problems = _problems(chosen)
    if problems:
        raise DataError(problems[0])


def check(scale: str) -> list[str]:
    """Why no run of the experiment would work here at a scale, one sentence each.

    A run with the pretrained model where that cannot be had is refused by `validate`; ``grass doctor`` says it too.
    """
    if scale not in SCALES:
        raise UsageError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    if scale == "embedded":
        return _problems(protocol(scale))
    problems = _problems(protocol(scale, weights="random"))
    if not torch.cuda.is_available():
        problems = [*problems, "scale paper needs a CUDA GPU, and none is usable here; run it on a machine with one"]
    return problems


def data_fingerprint(scale: str) -> str:
    """A hash of the files behind a scale; the hub's copies have their names.

    Raises:
        UsageError: There is no such scale.
        DataError: A file is missing.
    """
    if scale not in SCALES:
        raise UsageError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    if scale == "embedded":
        parts = [articles_fingerprint(), "smollm2" if smollm2_path() else "tiny"]
    else:
        parts = [openwebtext_fingerprint(), HUB if llama_folder() is None else "GRASS_DATA"]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def task(scale: str, parameters: Mapping[str, Any], device: str, progress: bool = True) -> AttributionTask:
    """What caching and querying need; a prompt becomes a query by the answer that the model gives to it.

    Args:
        scale: ``embedded`` or ``paper``.
        parameters: Of the notebook; those that are not given have the scale's own values.
        device: Where the model goes.
        progress: Whether bars are shown.

    Raises:
        UsageError: A parameter cannot work.
        DataError: Model or data cannot be had.
    """
    chosen, seed = _protocol_of(scale, parameters), int(parameters.get("seed", 0))
    folder = runs_root() / "shared" / f"llama3_openwebtext-{scale}-networks"
    folder.mkdir(parents=True, exist_ok=True)
    chat = load_model(chosen, device, folder)
    text = load_passages(chosen, chat, seed)

    head, fp8 = bool(parameters.get("head", True)), bool(parameters.get("fp8", False))

    def encode(prompt: str) -> dict[str, Tensor]:
        return query_batches([answer(chat, prompt, chosen.new_tokens)], chat.padding)[0]

    def answer_of(batch: Any) -> str:
        counted = batch["labels"][0][batch["labels"][0] != IGNORED]
        return chat.tokenizer.decode(counted.tolist()) if chat.tokenizer else ""

    return AttributionTask(
        model=chat.model,
        loss=chunked_causal_loss,
        target=None,
        layers=layers_of(chosen, chat, head),
        include_head=head,
        train=text.batches(chosen.batch_size),
        n_train=len(text),
        data_sha256=text.sha256,
        encode=encode,
        passage=text.text,
        parameters={
            "seed": seed,
            "weights": chosen.weights,
            "max_tokens": int(parameters.get("max_tokens", 0)),
            "batch_size": int(parameters.get("batch_size", 0)),
            "head": head,
            "fp8": fp8,
        },
        fp8=fp8,
        answer=answer_of,
    )


def _protocol_of(scale: str, parameters: Mapping[str, Any]) -> Protocol:
    return protocol(
        scale,
        weights=parameters.get("weights", "pretrained"),
        max_tokens=int(parameters.get("max_tokens", 0)),
        batch_size=int(parameters.get("batch_size", 0)),
    )


def _problems(chosen: Protocol) -> list[str]:
    """What keeps model or data of a protocol from being had here, one sentence each."""
    missing = [name for name in ("transformers", "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        return [f"Llama needs {' and '.join(missing)}, not installed here; run `make setup`"]
    try:
        if chosen.scale == "embedded":
            articles_fingerprint()
            return []
        return [] if chosen.weights == "random" else [*llama_problems(), *openwebtext_problems()]
    except DataError as error:
        return [str(error)]
