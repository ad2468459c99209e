"""The Llama experiment: protocol, prompts, queries, phases from what is on the disk, and a model in a local folder."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import make_llama

from grass_lib import InfluenceFunction
from grass_lib.errors import DataError, SpecError, UsageError
from grass_lib.experiments import EXPERIMENTS, llama3_openwebtext
from grass_lib.experiments.data.documents import TITLES
from grass_lib.experiments.data.tokenizers import train_tokenizer
from grass_lib.experiments.llama3_models import ChatModel
from grass_lib.experiments.llama3_protocol import PHASES, parse_phases, protocol
from grass_lib.experiments.llama3_queries import Answer, Prompt, answer, answers, load_prompts, query_batches
from grass_lib.experiments.llama3_results import Results
from grass_lib.gradients import FactoredGradients, chunked_causal_loss
from grass_lib.store import GradientStore

PARAMETERS = {
    **{
        "phase": "all",
        "seed": 0,
        "weights": "pretrained",
        "max_tokens": 0,
        "specs": "",
        "head": True,
        "hessian": "eFIM",
    },
    **{
        "damping": 0.0,
        "dtype": "bfloat16",
        "batch_size": 0,
        "n_prompts": 0,
        "deterministic": True,
        "fp8": False,
        "device": "cpu",
    },
}


class Letters:
    """A tokenizer of 26 letters; 0 is padding, 1 a space."""

    def encode(self, text):
        return [1 if mark == " " else 2 + (ord(mark) - 97) % 30 for mark in text.lower()]

    def decode(self, ids):
        return "".join(" " if token == 1 else chr(95 + token) for token in ids)


def chat_model(**changes):
    given = {
        "model": make_llama(),
        "tokenizer": Letters(),
        "chat": lambda prompt: f"q {prompt}",
        "stop": (),
        "padding": 0,
    }
    return ChatModel(**{**given, "name": "tiny", "weights": "substitute", "note": "for tests", **changes})


def test_prompts_are_twelve_of_different_subjects():
    prompts = load_prompts()
    assert len(prompts) == len({prompt.article for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 12
    assert {prompt.article for prompt in prompts} <= set(TITLES)
    assert load_prompts(6) == prompts[:6]
    with pytest.raises(UsageError, match="1 to 12"):
        load_prompts(13)


def test_scales():
    full, small = protocol("paper"), protocol("embedded")
    assert (full.length, full.max_tokens, full.n_prompts, full.spec) == (
        1024,
        10**6,
        12,
        "random_mask-128*128->sjlt-4096",
    )
    assert full.layers(32, True) == "linear"
    # Two shards of 225 layers stay within a gibibyte of pinned memory.
    assert 2 * full.shard_size * 225 * 4096 * 2 <= 2**30
    assert full.shard_size % full.batch_size == 0
    assert small.layers(30, True) == [*(f"model.layers.{block}.*_proj" for block in range(24, 30)), "lm_head"]
    assert small.layers(30, False)[-1] == "model.layers.29.*_proj"
    assert small.layers(4, True) == "linear"
    assert protocol("paper", batch_size=4).shard_size == 256
    assert parse_phases("all") == PHASES
    assert parse_phases("attribute, cache") == ("cache", "attribute")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scale": "full"}, "scale"),
        ({"weights": "none"}, "weights"),
        ({"weights": "random", "scale": "embedded"}, "for scale=paper"),
        ({"max_tokens": 5, "scale": "embedded"}, "for scale=paper"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"phase": "cache,train"}, "phase is"),
        ({"weights": "random"}, "answer nothing"),
        ({"dtype": "int4"}, "dtype"),
        ({"damping": -1.0}, "damping"),
        ({"n_prompts": 99, "weights": "random", "phase": "cache"}, "99 prompts"),
        ({"hessian": "ekfac", "weights": "random", "phase": "cache"}, "ekfac"),
    ],
)
def test_parameters_that_cannot_work(changes, match):
    given = {**PARAMETERS, **changes}
    with pytest.raises(UsageError, match=match):
        EXPERIMENTS["llama3_openwebtext"].validate(given.pop("scale", "paper"), given)


@pytest.mark.parametrize(
    ("specs", "error", "match"),
    [
        ("random_mask-4096->sjlt-256", SpecError, "whole gradients"),
        ("selective_mask-8*8->identity", SpecError, "mask files"),
        ("normal-8*8->identity,normal-4*4->identity", UsageError, "2 compressions"),
    ],
)
def test_specs_that_cannot_work(specs, error, match):
    with pytest.raises(error, match=match):
        protocol("embedded").compression(specs)


def test_random_weights_pass_where_the_model_is_gated(monkeypatch):
    monkeypatch.delenv("GRASS_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    llama3_openwebtext.validate("paper", {**PARAMETERS, "weights": "random", "phase": "cache"})
    with pytest.raises(DataError, match="weights=random"):
        llama3_openwebtext.validate("paper", PARAMETERS)
    assert llama3_openwebtext.check("embedded") == []
    assert len(llama3_openwebtext.data_fingerprint("embedded")) == 64


def test_fp8_is_a_setting_of_its_own(tmp_path, monkeypatch):
    text = SimpleNamespace(sha256="1")
    made = [
        llama3_openwebtext.results_of(tmp_path, protocol("paper"), chat_model(), text, seed=0, **given)
        for given in ({}, {"fp8": False}, {"fp8": True})
    ]
    # Results from before the switch are found again, and never those of another setting.
    assert made[0].folder == made[1].folder != made[2].folder
    assert made[2].read_json("identity")["fp8"] is True
    given = {**PARAMETERS, "weights": "random", "phase": "cache", "fp8": True}
    llama3_openwebtext.validate("paper", given)
    monkeypatch.setattr(llama3_openwebtext, "device_problem", lambda device: f"no such products on {device}")
    llama3_openwebtext.validate("paper", {**given, "fp8": False})
    with pytest.raises(UsageError, match="fp8 is True, and no such products on cpu"):
        llama3_openwebtext.validate("paper", given)


def test_an_answer_is_the_likeliest_one_token_by_token():
    chat = chat_model()
    found = answer(chat, "why", 5)
    ids = torch.tensor([found.prompt_tokens])
    for token in found.tokens:
        assert token == int(chat.model(input_ids=ids).logits[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert len(found.tokens) == 5
    ended = answer(chat_model(stop=(found.tokens[2],)), "why", 5)
    assert ended.tokens == found.tokens[: found.tokens.index(found.tokens[2]) + 1]
    assert chat.model.config.use_cache is False
    for wrong in ("", "   "):
        with pytest.raises(UsageError, match="no tokens"):
            answer(chat, wrong, 5)
    with pytest.raises(UsageError, match="no tokenizer"):
        answer(chat_model(tokenizer=None), "why", 5)


def test_answers_are_kept(tmp_path, monkeypatch):
    prompts, results = [Prompt("a", "why"), Prompt("b", "how")], Results(tmp_path, {"model": "tiny"})
    first = answers(chat_model(), prompts, 3, results)
    again = answers(chat_model(model=None), prompts, 3, Results(tmp_path, {"model": "tiny"}))
    assert again == first
    with pytest.raises(UsageError, match="no tokenizer or weights"):
        answers(chat_model(model=None), prompts, 4, results)


def test_prompt_and_padding_never_count_in_a_query():
    """Rows of a padded batch are those of each answer alone, and only the answer's tokens have an effect."""
    model = make_llama(torch.float64)
    found = [Answer("", [3, 4, 5], [6, 7], ""), Answer("", [8], [9, 10, 11, 12, 13], "")]
    options = {"include_head": True, "sparsification": "random_mask-6*5", "dtype": torch.float64}
    gradients = FactoredGradients(model, chunked_causal_loss, **options)
    (batch,) = query_batches(found, padding=0, size=2)
    together, values = gradients(batch)
    for place, each in enumerate(found):
        ids = torch.tensor([each.prompt_tokens + each.tokens])
        log = model(input_ids=ids).logits[0].log_softmax(dim=-1)
        start = len(each.prompt_tokens)
        wanted = -sum(log[start - 1 + i, token] for i, token in enumerate(each.tokens))
        torch.testing.assert_close(values[place], wanted.detach())
        alone, _ = gradients(query_batches([each], padding=0)[0])
        for name, rows in together.items():
            torch.testing.assert_close(rows[place], alone[name][0], rtol=1e-9, atol=1e-11)
    (other,) = query_batches(found, padding=17, size=2)
    for name, rows in gradients(other)[0].items():
        torch.testing.assert_close(rows, together[name], rtol=1e-9, atol=1e-11)
    with pytest.raises(UsageError, match="no answers"):
        query_batches([], 0)
    with pytest.raises(UsageError, match="0 queries"):
        query_batches(found, 0, size=0)


def test_results_that_are_not_there_name_the_phase(tmp_path):
    results = Results(tmp_path, {"model": "tiny"})
    assert results.read_json("cached") is None
    with pytest.raises(UsageError, match="-p phase=attribute"):
        results.read_tensors("scores", "attribute")
    results.write_tensors("scores", {"scores": torch.eye(2)})
    assert torch.equal(results.read_tensors("scores", "attribute")["scores"], torch.eye(2))
    assert Results(tmp_path, {"model": "other"}).folder != results.folder
    (results.folder / "scores.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="run the phase attribute again"):
        results.read_tensors("scores", "attribute")
    (results.folder / "cached.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"cached\.json"):
        results.read_json("cached")


@pytest.fixture
def local(tmp_path, monkeypatch):
    """GRASS_DATA with a tiny Llama, its tokenizer and some text: the paper's scale on a CPU."""
    from transformers import PreTrainedTokenizerFast

    texts = [f"passage {number} on snow and the sun at noon, {number * 7} times. " * 6 for number in range(80)]
    own = train_tokenizer(iter(texts), 300)
    folder = tmp_path / "data"
    (folder / "openwebtext").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "openwebtext" / "a.jsonl").write_text(lines, encoding="utf-8")
    engine = own._engine._tokenizer
    PreTrainedTokenizerFast(tokenizer_object=engine, eos_token="!", pad_token="!").save_pretrained(folder / "llama3")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "llama3")
    monkeypatch.setenv("GRASS_DATA", str(folder))
    monkeypatch.setenv("GRASS_RUNS", str(tmp_path / "runs"))
    return folder


def test_the_papers_scale_from_local_folders(local, tmp_path):
    given = {**PARAMETERS, "max_tokens": 6000, "batch_size": 2}
    llama3_openwebtext.validate("paper", given)
    chosen = protocol("paper", max_tokens=6000, batch_size=2)
    chat = llama3_openwebtext.load_model(chosen, "cpu", tmp_path)
    assert next(chat.model.parameters()).dtype == torch.bfloat16
    assert chat.weights == "substitute"
    text = llama3_openwebtext.load_passages(chosen, chat)
    assert text.ids.shape == (5, 1024)
    alone = llama3_openwebtext.load_model(chosen, "cpu", tmp_path, with_model=False)
    assert alone.model is None
    assert alone.tokenizer.encode("snow") == chat.tokenizer.encode("snow")
    task = llama3_openwebtext.task("paper", given, "cpu")
    influence = InfluenceFunction(
        *(task.model, task.loss),
        layers=task.layers,
        include_head=task.include_head,
        sparsification="random_mask-4*4",
        store=tmp_path / "store",
        progress=False,
        source={"x": 1},
    )
    assert len(influence.sizes) == 15
    assert (task.fp8, task.parameters["fp8"]) == (False, False)
    assert llama3_openwebtext.task("paper", {**given, "fp8": True}, "cpu").fp8
    influence.cache(task.train)
    scores = influence.attribute([task.encode("why is snow white")], damping=1.0)
    assert scores.shape == (5, 1)
    assert scores.isfinite().all()
    assert task.passage(0)


def test_the_notebook_has_the_parameters_that_are_checked():
    from grass_lib.runner.parameters import read_parameters

    experiment = EXPERIMENTS["llama3_openwebtext"]
    found = read_parameters(Path(__file__).parents[2] / "notebooks" / experiment.notebook)
    assert set(found) - {"scale", "run_id"} == set(PARAMETERS)


def test_phases_that_need_gradients_say_so_before_anything_is_computed(tmp_path):
    results = Results(tmp_path, {"model": "tiny"})
    for phases in (("cache",), ("cache", "attribute"), ("retrieve",)):
        results.check_phases(phases)
    for phases in (("attribute",), ("self_influence", "retrieve")):
        with pytest.raises(UsageError, match="not there; run the phase cache first"):
            results.check_phases(phases)
    store = GradientStore.create(results.gradients, layers={"a": 3}, n_samples=4, shard_size=2, fingerprint={})
    rows = torch.zeros(2, 3)
    with store.writer() as writer:
        writer.submit(0, {"a": rows})
    with pytest.raises(UsageError, match="not finished; run the phase cache first"):
        results.check_phases(("attribute",))
    with store.writer() as writer:
        writer.submit(1, {"a": rows})
    results.check_phases(("self_influence", "attribute"))
