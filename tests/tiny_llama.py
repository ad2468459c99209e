"""A Llama of four layers with grouped-query attention, and batches with padding on the right."""

import torch
from torch import Tensor

VOCABULARY, LENGTH = 37, 9


def make_llama(dtype: torch.dtype = torch.float32, *, layers: int = 4, seed: int = 0, tied: bool = False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype).eval()


def make_batch(n: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of different lengths, padded with token 0 on the right, whose labels do not count there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n, LENGTH), generator=generator)
    lengths = torch.arange(n) * 2 % (LENGTH - 2) + 3
    padding = torch.arange(LENGTH) >= lengths[:, None]
    return {"input_ids": ids.masked_fill(padding, 0), "labels": ids.masked_fill(padding, -100)}


def rows_of(batch: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    return {name: value[part] for name, value in batch.items()}
