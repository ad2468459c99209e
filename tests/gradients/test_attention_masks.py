import threading

import pytest
import tiny_llama
import torch

from grass_lib import TRAK
from grass_lib.errors import UsageError
from grass_lib.gradients import PerSampleGradients, causal_margin
from grass_lib.gradients.attention_masks import whole_masks


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=tiny_llama.VOCABULARY,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()


def masked_batch(side: str = "right") -> dict[str, torch.Tensor]:
    batch = tiny_llama.make_batch(4)
    if side == "left":
        batch = {name: value.flip(1) for name, value in batch.items()}
    if side == "none":
        batch["labels"] = batch["input_ids"] = batch["input_ids"].clamp_min(1)
    return {**batch, "attention_mask": (batch["labels"] != -100).long()}


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama.make_llama])
def test_language_models_with_an_attention_mask_agree_with_one_backward_pass_per_sample(make, side):
    model, batch = make(), masked_batch(side)
    rows, values = PerSampleGradients(model, causal_margin)(None, batch)
    for place, row in enumerate(rows):
        value = causal_margin(model, tiny_llama.rows_of(batch, slice(place, place + 1)))[0]
        found = torch.autograd.grad(value, list(model.parameters()))
        torch.testing.assert_close(row, torch.cat([part.flatten() for part in found]), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(values[place], value.detach())


def test_trak_takes_an_attention_mask():
    model = tiny_gpt2()
    trak = TRAK(model, [model.state_dict()], projection="sjlt-64", output=causal_margin, progress=False)
    trak.cache([masked_batch()])
    assert trak.attribute([masked_batch()]).shape == (4, 4)


def test_transformers_is_left_as_found():
    from transformers import masking_utils

    registry = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    before = dict(registry)

    def stopped():
        with whole_masks():
            assert registry["sdpa"] is not before["sdpa"]
            raise KeyError

    with pytest.raises(KeyError):
        stopped()
    assert dict(registry) == before
    registry["eager"] = own = lambda **options: None
    try:
        with whole_masks():
            pass
        assert registry["eager"] is own
    finally:
        del registry["eager"]


def test_what_vmap_cannot_run_is_one_sentence_with_the_ways_out():
    batch = masked_batch() | {"position_ids": torch.arange(tiny_llama.LENGTH).expand(4, -1)}
    del batch["attention_mask"]
    with pytest.raises(UsageError, match=r"values of a tensor.*attn_implementation='eager'.*random_mask"):
        PerSampleGradients(tiny_gpt2(), causal_margin)(None, batch)


def test_threads_share_the_switch():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as REGISTRY

    before, inside, leave = REGISTRY["sdpa"], threading.Event(), threading.Event()

    def other():
        with whole_masks():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with whole_masks():
        changed = REGISTRY["sdpa"]
        thread.start()
        assert inside.wait(10)
    assert REGISTRY["sdpa"] is changed is not before  # the other one is still in its block
    leave.set()
    thread.join()
    assert REGISTRY["sdpa"] is before
