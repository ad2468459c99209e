"""FP8 products on a GPU: the hardware's products against the CPU's roundings, compiled blocks, memory given back."""

import pytest
import torch
from tiny_llama import make_batch

from grass_lib.errors import UsageError
from grass_lib.gradients import FactoredGradients, chunked_causal_loss, fp8

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hardware():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    problem = fp8.device_problem(torch.device("cuda"))
    if problem:
        pytest.skip(problem)


def make_wide():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 48, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "use_cache": False},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"bos_token_id": None, "eos_token_id": None},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("m", [1, 37, 4096])
def test_products_are_those_of_the_cpu(m):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, 4096, generator=generator).bfloat16()
    weight = torch.randn(1024, 4096, generator=generator).bfloat16()
    rows, row_scales, columns, column_scales = fp8._tables(weight)
    there = fp8._tables(weight.cuda())
    for one, two in zip((rows, row_scales, columns, column_scales), there, strict=True):
        torch.testing.assert_close(two.cpu().float(), one.float(), rtol=1e-6, atol=0)
    for given, table, scales, mine in (
        (x, rows, row_scales, there[:2]),
        (x[:, :1024], columns, column_scales, there[2:]),
    ):
        wanted = fp8.product(given, table, scales).float()
        found = fp8.product(given.cuda(), *mine).cpu().float()
        # Fast sums of the hardware keep about 14 bits, and cut what is below after every 32 of the 4096 numbers.
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_compiled_blocks_in_bfloat16():
    model, batch = make_wide().cuda(), make_batch(8)
    before = {name: value.clone() for name, value in model.named_parameters()}
    options = {"include_head": True, "sparsification": "random_mask-16*16", "projection": "sjlt-64"}
    exact, _ = FactoredGradients(model, chunked_causal_loss, **options)(batch)
    blocks = FactoredGradients(model, chunked_causal_loss, compile="blocks", fp8=True, **options)
    with blocks.attached():
        found = [blocks(batch)[0] for _ in range(2)][1]
    plain, _ = FactoredGradients(model, chunked_causal_loss, fp8=True, **options)(batch)
    for rows in (found, plain):
        cosines = torch.stack([torch.cosine_similarity(rows[name], exact[name], dim=1).mean() for name in exact])
        assert 0.9 < float(cosines.min()) < 0.99999
    for name, value in model.named_parameters():
        assert value.is_cuda
        assert torch.equal(value, before[name]), name


def test_weights_in_fp8_take_the_place_of_the_others():
    model = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, bias=False) for _ in range(8)))
    model = model.bfloat16().cuda().requires_grad_(False)
    names, weights = [str(number) for number in range(8)], sum(weight.nbytes for weight in model.parameters())
    # Differences: whatever ran before may hold memory, workspaces of cuBLAS for one.
    before = torch.cuda.memory_allocated()
    with fp8.fp8_products(model, names):
        assert torch.cuda.memory_allocated() - before < 0.02 * weights
    assert torch.cuda.memory_allocated() - before < 0.02 * weights
    with fp8.fp8_products(model, names, keep_weights=True):
        assert torch.cuda.memory_allocated() - before > 0.9 * weights
    with pytest.raises(UsageError, match="trainable"), fp8.fp8_products(model.requires_grad_(True), ["0"]):
        pass
