"""What the model is asked, what it answers, and how an answer becomes a query: its own tokens count, nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.passages import batch_of, padded
from grass_lib.experiments.llama3_models import ChatModel
from grass_lib.experiments.llama3_results import Results


@dataclass(frozen=True)
class Prompt:
    """A question.

    Attributes:
        name: For people.
        text: What is asked.
        article: Wikipedia article on its subject.
    """

    name: str
    text: str
    article: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        prompt: The question's text.
        prompt_tokens: The question as the model read it.
        tokens: The answer, with the token that ended it where there was one.
        text: The answer as text.
    """

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int]
    text: str


def load_prompts(count: int | None = None) -> list[Prompt]:
    """The questions of the list that comes with the library, in its order.

    Args:
        count: How many, from the beginning; None for all.

    Raises:
        UsageError: The list has fewer.
    """
    rows = json.loads(resources.files("grass_lib.experiments").joinpath("prompts.json").read_text(encoding="utf-8"))
    if count is not None and not 1 <= count <= len(rows):
        raise UsageError(f"{count} prompts were asked for; expected 1 to {len(rows)}, as many as the list has")
    return [Prompt(**row) for row in rows[:count]]


@torch.no_grad()
def answer(chat: ChatModel, prompt: str, new_tokens: int) -> Answer:
    """The model's most likely answer, token by token, so that it is the same in every run.

    Args:
        chat: The model.
        prompt: The question.
        new_tokens: Longest answer.

    Raises:
        UsageError: The prompt is empty, or the model has no tokenizer.
    """
    if chat.tokenizer is None or chat.model is None:
        raise UsageError(f"{chat.name} has no tokenizer or weights here; random weights answer nothing")
    asked = chat.tokenizer.encode(chat.chat(prompt)) if prompt.strip() else []
    if not asked:
        raise UsageError(f"the prompt {prompt!r} has no tokens; expected a question")
    device = next(chat.model.parameters()).device
    ids, cache, found = torch.tensor([asked], device=device), None, []
    for _ in range(new_tokens):
        result = chat.model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, token = result.past_key_values, int(result.logits[0, -1].argmax())
        found.append(token)
        if token in chat.stop:
            break
        ids = torch.tensor([[token]], device=device)
    said = found[:-1] if found[-1] in chat.stop else found
    return Answer(prompt, asked, found, chat.tokenizer.decode(said).strip())


def answers(chat: ChatModel, prompts: Sequence[Prompt], new_tokens: int, results: Results) -> list[Answer]:
    """The answers to all prompts; those of an earlier attempt are used again.

    Args:
        chat: The model; its weights are needed only for answers that are not there yet.
        prompts: The questions.
        new_tokens: Longest answer.
        results: Where answers are kept.
    """
    kept: dict[str, Any] = results.read_json("answers") or {}
    found = []
    for prompt in prompts:
        key = f"{new_tokens}: {prompt.text}"
        if key not in kept:
            kept[key] = asdict(answer(chat, prompt.text, new_tokens))
            results.write_json("answers", kept)
        try:
            found.append(Answer(**kept[key]))
        except TypeError as error:
            raise DataError(f"the kept answer to {prompt.text!r} is not readable; delete answers.json") from error
    return found


def query_batches(found: Sequence[Answer], padding: int, size: int = 1) -> list[dict[str, Tensor]]:
    """Queries whose loss counts the tokens of the answer only: neither the question nor padding.

    Args:
        found: Answers.
        padding: Token that fills shorter rows, on the right.
        size: Queries in a batch; results do not depend on it.

    Raises:
        UsageError: There are no answers, or ``size`` is below 1.
    """
    if size < 1:
        raise UsageError(f"batches of {size} queries; expected 1 or more")
    if not found:
        raise UsageError("there are no answers; expected one or more to make queries of")
    batches = []
    for start in range(0, len(found), size):
        part = found[start : start + size]
        ids, lengths = padded([each.prompt_tokens + each.tokens for each in part], padding)
        batches.append(batch_of(ids, lengths, torch.tensor([len(each.prompt_tokens) for each in part])))
    return batches
