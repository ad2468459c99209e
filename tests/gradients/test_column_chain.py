"""Columns copied beside a compiled pass: each call holds what the one before reads and writes, the last one waits."""

import sys
from itertools import pairwise

import pytest
import torch
from test_factored import N, assert_equal, case, expected
from torch import nn

from grass_lib.errors import UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.outputs import cross_entropy
from grass_lib.kernels import columns

MASK = "random_mask-4*3"


def step(factored, batch):
    with factored.attached():
        uses = factored._pass.single_uses(factored.loss, batch, len(batch[0]))
        return factored.deferred_step(batch, len(batch[0]), uses)[0]


@pytest.fixture
def calls(monkeypatch):
    """Of every call: the tensor's address and width, whether it waits for itself, and what it holds."""
    found = []

    def seen(x, index, ones=False):
        given = sys._getframe(1).f_locals
        if "held" in given:
            found.append((x.data_ptr(), x.shape[1], given["last"], [part.data_ptr() for part in given["held"]]))
        return taken(x, index, ones)

    taken = columns.kept_columns
    monkeypatch.setattr(columns, "kept_columns", seen)
    return found


def test_each_call_holds_the_one_before(calls):
    model, batch, loss = case("text")
    factored = FactoredGradients(model, loss, sparsification=MASK, compile=True)
    step(factored, batch)
    calls.clear()
    found = step(factored, batch)
    assert_equal(found, expected("text", MASK, "identity", factored.layers))
    forward, backward = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    layers = list(factored.layers.values())
    assert [width for _, width, _, _ in forward] == [layer.d_in - layer.bias for layer in layers]
    assert [width for _, width, _, _ in backward] == [layer.d_out for layer in reversed(layers)]
    for half in (forward, backward):
        assert len(half) == 4
        assert [last for *_, last, _ in half] == [False, False, False, True]
        assert half[0][3] == []
        for before, (_, _, _, held) in pairwise(half):
            assert len(held) == 2
            assert held[0] == before[0]
            assert held[1] not in (before[0], 0)


def test_nothing_is_held_once_the_forward_pass_is_over(monkeypatch):
    model, batch, loss = case("text")
    factored, grad, held = FactoredGradients(model, loss, sparsification=MASK, compile=True), torch.autograd.grad, []

    def watched(*args, **options):
        held.append((factored._pass._chain._before, factored._pass._chain._links))
        return grad(*args, **options)

    step(factored, batch)  # compiles, which takes gradients by itself
    monkeypatch.setattr(torch.autograd, "grad", watched)
    step(factored, batch)
    assert held == [((), ())]


def test_dense_maps_have_no_chain(calls):
    model, batch, loss = case("text")
    factored = FactoredGradients(model, loss, sparsification="normal-4*3", compile=True)
    assert_equal(step(factored, batch), expected("text", "normal-4*3", "identity", factored.layers))
    assert calls == []


@pytest.mark.parametrize("name", ["twice", "unused", "conv1d", "mlp"])
def test_other_models(name, calls):
    model, batch, loss = case(name)
    factored = FactoredGradients(model, loss, sparsification=MASK, compile=True)
    found = step(factored, batch)
    assert_equal(found, expected(name, MASK, "identity", factored.layers))
    single = {"twice": 1, "unused": 1, "conv1d": 1, "mlp": 1}[name]
    assert sum(last for *_, last, _ in calls) == 2
    assert len(calls) == 2 * single


class Branches(nn.Module):
    """Layers side by side, whose gradients a backward pass may take in any order, and one that may be left out."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.end = nn.Linear(5, 6), nn.Linear(5, 7), nn.Linear(5, 6), nn.Linear(6, 8)
        self.skips = False

    def forward(self, x):
        three, two, one = self.three(x), self.two(x), self.one(x)
        both = (one * three).tanh() + two[:, :6].sin()
        return both if self.skips else self.end(both)


def branches():
    torch.manual_seed(0)
    return Branches(), (torch.randn(N, 5), torch.arange(N) % 4)


def test_layers_side_by_side(calls):
    model, batch = branches()
    wanted, _ = FactoredGradients(model, cross_entropy, sparsification=MASK)(batch)
    assert calls == []
    found = step(FactoredGradients(model, cross_entropy, sparsification=MASK, compile=True), batch)
    assert_equal(found, {name: rows.double() for name, rows in wanted.items()})
    assert len(calls) == 8
    # In the order of the calls, not of the model's attributes.
    assert [width for _, width, _, _ in calls[4:]] == [8, 6, 7, 6]


def test_a_pass_that_leaves_out_the_end_is_refused():
    model, batch = branches()
    factored = FactoredGradients(model, cross_entropy, sparsification=MASK, compile=True)
    with factored.attached():
        uses = factored._pass.single_uses(cross_entropy, batch, N)
        model.skips = True
        with pytest.raises(UsageError, match=r"did not call layer 'end' after 'one'.*compile=False"):
            factored.deferred_step(batch, N, uses)


def deep(dtype):
    """A model whose products are short enough that copies beside them matter, and batches."""
    torch.manual_seed(0)
    widths = [768, 3072, 768, 512, 2048, 768]
    model = nn.Sequential(*[part for one in pairwise(widths) for part in (nn.Linear(*one), nn.GELU())])
    return model.to("cuda", dtype), [(torch.randn(8, 256, 768, device="cuda", dtype=dtype),) for _ in range(3)]


def squares(model, batch):
    return model(batch[0]).float().square().sum(dim=(1, 2))


RECORDED = {"sparsification": "random_mask-64*64", "projection": "sjlt-512", "compile": True, "graph": True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_copies_beside_the_pass_change_no_bit(dtype, monkeypatch):
    model, batches = deep(dtype)
    ran, run = [], columns._Side.run
    monkeypatch.setattr(columns._Side, "run", lambda *given: ran.append(1) or run(*given))
    beside = FactoredGradients(model, squares, **RECORDED)
    found = [beside(batch)[0] for _ in range(10) for batch in batches]
    assert len(ran) == 8  # of 5 layers twice, without the last of each pass
    monkeypatch.setattr(columns, "_columns_beside", lambda x, index, ones, last, held: columns._columns(x, index, ones))
    torch._dynamo.reset()
    alone = FactoredGradients(model, squares, **RECORDED)
    wanted = [alone(batch)[0] for batch in batches]
    assert len(ran) == 8
    for place, rows in enumerate(found):
        for name, part in rows.items():
            assert torch.equal(part, wanted[place % 3][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_a_step_whose_tensors_are_moved_is_recorded_without_copies_beside(monkeypatch):
    model, batches = deep(torch.bfloat16)
    ran, run, join = [], columns._Side.run, columns._Side.join
    monkeypatch.setattr(columns._Side, "run", lambda *given: ran.append(1) or run(*given))
    monkeypatch.setattr(
        columns._Side, "join", lambda self, held=None: join(self, held and [part.clone() for part in held])
    )
    found = FactoredGradients(model, squares, **RECORDED)(batches[0])[0]
    assert len(ran) == 1
    monkeypatch.undo()
    wanted = FactoredGradients(model, squares, **RECORDED)(batches[0])[0]
    for name, part in found.items():
        assert torch.equal(part, wanted[name]), name
