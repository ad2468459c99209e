"""FP8 products: the roundings against float64, the model as it was, independence of samples, compiled blocks."""

from functools import partial

import pytest
import torch
from tiny_llama import make_batch, rows_of
from torch import nn
from torch.overrides import TorchFunctionMode

from grass_lib import InfluenceFunction
from grass_lib.errors import StoreError, UsageError
from grass_lib.gradients import FactoredGradients, causal_loss, chunked_causal_loss, fp8
from grass_lib.gradients.fp8 import FP8Linear, block_linears, check_fp8, fp8_products

MASKED = {"sparsification": "random_mask-6*5", "projection": "sjlt-11"}


def make_wide(dtype=torch.float32, layers=3, bias=False):
    """A Llama whose sides are multiples of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False},
        **{"initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None, "attention_bias": bias},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype).eval()


def rounded(x):
    """Rows of a float64 matrix as e4m3 can hold them: three bits after the first, smallest step 2^-9, largest 448."""
    # In float32 and in the library's steps: half-way cases are many where inputs are of bfloat16.
    scales = x.abs().amax(dim=1, keepdim=True).float() * (1 / 448)
    scaled = (x.float() / scales.clamp_min(1e-30)).double()
    step = 2.0 ** (torch.floor(torch.log2(scaled.abs().clamp_min(2.0**-6))) - 3)
    return (torch.round(scaled / step) * step).clamp(-448, 448) * scales.double()


def state_of(model):
    found = {name: (id(value), value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    return found, {name: (id(module), type(module)) for name, module in model.named_modules()}


def is_as_before(model, before):
    parameters, modules = before
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == modules
    for name, value in model.named_parameters():
        key, kept, flag = parameters[name]
        assert (id(value), value.requires_grad) == (key, flag)
        assert torch.equal(value, kept), name
        assert value.is_contiguous()
    assert set(dict(model.named_parameters())) == set(parameters)
    assert not [name for name, _ in model.named_buffers() if "fp8" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_forward_and_backward_against_float64(dtype):
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(48, 32).to(dtype).requires_grad_(False)
    x = torch.randn(3, 7, 48, generator=generator).to(dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    x[0, 0] = 0.0
    delta = torch.randn(3, 7, 32, generator=generator).to(dtype)
    weight = layer.weight.double()
    wanted = rounded(x.double().flatten(0, 1)) @ rounded(weight).T + layer.bias.double()
    wanted_below = rounded(delta.double().flatten(0, 1)) @ rounded(weight.T.contiguous()).T
    model = nn.Sequential(layer)
    given = x.clone().requires_grad_()
    with fp8_products(model, ["0"]):
        y = model(given)
        (below,) = torch.autograd.grad(y, given, delta)
    assert y.dtype == below.dtype == dtype
    # Results are rounded to bfloat16, eight bits, and once more where the bias is added.
    for found, exact in ((y, wanted), (below, wanted_below)):
        found, scale = found.detach().double().flatten(0, 1), exact.abs().amax(dim=1, keepdim=True)
        assert ((found - exact).abs() <= 2.0**-7 * scale).all()
    # And what the rounding to e4m3 costs is there: without it, the test above would prove nothing.
    plain = x.double().flatten(0, 1) @ weight.T + layer.bias.double()
    error = (wanted - plain).norm() / plain.norm()
    assert 0.005 < error < 0.06


def test_the_kernel_of_torch_takes_the_same_arguments(monkeypatch):
    x, weight = torch.randn(21, 48).bfloat16(), torch.randn(32, 48).bfloat16()
    rows, row_scales, columns, column_scales = fp8._tables(weight)
    assert (rows.shape, columns.shape) == ((32, 48), (48, 32))
    assert (row_scales.shape, column_scales.shape) == ((1, 32), (1, 48))
    assert all(table.is_contiguous() for table in (rows, columns, row_scales, column_scales))
    delta = torch.randn(21, 32).bfloat16()
    wanted = [fp8.product(x, rows, row_scales), fp8.product(delta, columns, column_scales)]
    calls = []

    def kernel(left, right, left_scales, right_scales, **options):
        # What a GPU asks for: row-major times column-major, sides of multiples of 16, scales by row and column.
        assert left.stride() == (left.shape[1], 1)
        assert right.stride() == (1, right.shape[0])
        assert left_scales.shape == (len(left), 1)
        assert right_scales.shape == (1, right.shape[1])
        assert left_scales.is_contiguous()
        assert right_scales.is_contiguous()
        assert {left_scales.dtype, right_scales.dtype} == {torch.float32}
        assert not left.shape[1] % 16
        assert not right.shape[1] % 16
        calls.append(options)
        try:
            return torch._scaled_mm(left, right, left_scales, right_scales, **options)
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"this torch has no such product on a CPU: {error}")

    monkeypatch.setattr(fp8, "_multiplied", kernel)
    found = [fp8.product(x, rows, row_scales), fp8.product(delta, columns, column_scales)]
    assert calls == 2 * [{"out_dtype": torch.bfloat16, "use_fast_accum": True}]
    for ours, theirs in zip(wanted, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_comes_from_one_operation(dtype):
    # One that hands its input on gives the result a second name: PyTorch 2.11, compiling, then loses its gradient.
    class Results(TorchFunctionMode):
        def __init__(self):
            self.all = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.all.append(func(*args, **(kwargs or {})))
            return self.all[-1]

    x, (rows, scales, _, _) = torch.randn(5, 48).to(dtype), fp8._tables(torch.randn(32, 48))
    with Results() as results:
        y = fp8.product(x, rows, scales)
    assert y.dtype == dtype
    assert sum(result is y for result in results.all) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_close_and_the_model_as_it_was(dtype):
    model, batch = make_wide(dtype, bias=True), make_batch()
    before = state_of(model)
    plain = FactoredGradients(model, causal_loss, include_head=True, **MASKED)
    eight = FactoredGradients(model, causal_loss, include_head=True, fp8=True, **MASKED)
    wanted, values = plain(batch)
    found, near = eight(batch)
    is_as_before(model, before)
    assert near == pytest.approx(values, rel=0.05)
    cosines = [torch.cosine_similarity(found[name].double(), wanted[name].double()).mean() for name in wanted]
    assert 0.9 < min(cosines) < 0.99999
    assert torch.equal(plain(batch)[1], values)


def test_inside_the_weights_take_no_memory_and_cannot_be_read():
    model = make_wide().requires_grad_(False)
    before = state_of(model)
    names = block_linears(model)
    assert len(names) == 3 * 7
    assert not any("lm_head" in name for name in names)
    with fp8_products(model):
        modules = dict(model.named_modules())
        for name in names:
            layer = modules[name]
            assert type(layer) is FP8Linear
            assert layer.weight.isnan().all()
            assert layer.weight.untyped_storage().nbytes() == layer.weight.element_size()
            assert layer.fp8_rows.nbytes + layer.fp8_columns.nbytes == 2 * layer.weight.numel()
        assert type(model.lm_head) is nn.Linear
        assert not [name for name in model.state_dict() if "fp8" in name]
    is_as_before(model, before)


def test_the_model_is_as_it_was_after_an_exception(monkeypatch):
    model, batch = make_wide(), make_batch()
    before = state_of(model)

    def broken(model, batch):
        causal_loss(model, batch)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        FactoredGradients(model, broken, fp8=True, **MASKED)(batch)
    is_as_before(model, before)
    # In the middle of entering, too.
    whole, left = fp8._tables, [5]

    def failing(weight):
        left[0] -= 1
        if not left[0]:
            raise MemoryError
        return whole(weight)

    monkeypatch.setattr(fp8, "_tables", failing)
    with pytest.raises(MemoryError):
        FactoredGradients(model, causal_loss, fp8=True, **MASKED)(batch)
    is_as_before(model, before)


def test_samples_do_not_depend_on_each_other():
    batch = make_batch(5)
    gradients = FactoredGradients(make_wide(torch.bfloat16), causal_loss, fp8=True, **MASKED)
    whole, _ = gradients(batch)
    large = {**batch, "input_ids": batch["input_ids"].flip(0), "labels": batch["labels"].flip(0)}
    alone = [gradients(rows_of(batch, slice(i, i + 1)))[0] for i in range(5)]
    for name, rows in whole.items():
        torch.testing.assert_close(torch.cat([each[name] for each in alone]), rows, rtol=0.02, atol=0.02)
        torch.testing.assert_close(gradients(large)[0][name].flip(0), rows, rtol=0.02, atol=0.02)


def test_shared_weights_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.other = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.two.weight = self.one.weight
            self.table = nn.Embedding(16, 16)
            self.other.weight = self.table.weight

        def forward(self, x):
            return self.other(self.two(self.one(x)))

    model = Twice().requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    x = torch.randn(4, 16)
    wanted = model(x)
    with fp8_products(model, ["one", "two", "other"]):
        assert model.table.weight.isfinite().all()
        assert model.one.weight.isnan().all()
        assert (model(x) - wanted).norm() < 0.2 * wanted.norm()
    assert torch.equal(model(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that are compiled, by a backend that needs no C++ compiler."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def count(graph, inputs):
        found.append(str(graph.code))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_give_the_rows_of_the_plain_pass(graphs, dtype):
    model, batch = make_wide(dtype, layers=4), make_batch()
    before = state_of(model)
    plain = FactoredGradients(model, chunked_causal_loss, include_head=True, fp8=True, **MASKED)
    blocks = FactoredGradients(model, chunked_causal_loss, include_head=True, compile="blocks", fp8=True, **MASKED)
    with blocks.attached():
        for part in (batch, make_batch(seed=1)):
            found, values = blocks(part)
            with torch.no_grad():
                assert type(model.model.layers[0].mlp.up_proj.inner) is FP8Linear
            for rows in found.values():
                assert rows.isfinite().all()
    is_as_before(model, before)
    wanted, exact = plain(make_batch(seed=1))
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=1e-3)
    for name, rows in wanted.items():
        # A sum in another order can make one number round to its neighbour.
        assert torch.cosine_similarity(found[name].flatten(), rows.flatten(), dim=0) > 0.999, name
    # The first block has nothing below it; all others share one code, the next time too.
    assert len(graphs) == 4
    assert sum("float8" in code for code in graphs) == 4
    blocks(batch)
    assert len(graphs) == 4


def test_stores_do_not_mix(tmp_path):
    model = make_wide()
    batches = [make_batch(4), make_batch(4, seed=1)]
    make = partial(
        InfluenceFunction, model, causal_loss, store=tmp_path / "store", hessian="Identity", progress=False, **MASKED
    )
    eight = make(fp8=True)
    eight.cache(batches, n_samples=8)
    scores = eight.attribute(batches)
    assert scores.shape == (8, 8)
    assert eight.store.fingerprint["fp8"] is True
    with pytest.raises(StoreError, match=r"fp8.* is .*"):
        make().cache(batches, n_samples=8)
    with pytest.raises(StoreError, match="fp8"):
        make().attribute(batches)
    other = make(store=tmp_path / "other")
    other.cache(batches, n_samples=8)
    assert "fp8" not in other.store.fingerprint
    assert not torch.equal(other.attribute(batches), scores)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Linear(24, 32), "multiples of 16"),
        (nn.Linear(32, 32).double(), "float64"),
        (nn.Conv1d(16, 16, 1), "a Conv1d"),
        (nn.Linear(16, 16, device="meta"), "the device is meta"),
        (nn.Linear(32, 32), "trainable"),
    ],
)
def test_layers_that_cannot(layer, match):
    with pytest.raises(UsageError, match=match), fp8_products(nn.Sequential(layer), ["0"]):
        pass


def test_what_cannot_work_is_said_before(monkeypatch):
    model = make_wide()
    with pytest.raises(UsageError, match="'none' is not there"):
        check_fp8(model, ["none"])
    with pytest.raises(UsageError, match="fp8=True needs a model with a list of equal blocks"):
        check_fp8(nn.Sequential(nn.Linear(16, 16)))
    for options in ({"compile": True}, {"graph": True}):
        with pytest.raises(UsageError, match="compile=False or 'blocks'"):
            FactoredGradients(model, causal_loss, fp8=True, **options, **MASKED)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an older GPU")
    assert "an older GPU has 8.0" in fp8.device_problem(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.device_problem(torch.device("cuda")) == ""
