"""Columns copied beside a compiled pass: each call holds what the one before reads and writes, the last one waits."""

import ctypes
import sys
from itertools import pairwise

import pytest
import torch
from test_factored import N, assert_equal, case, expected
from tiny_llama import make_batch, make_llama
from torch import nn

from grass_lib.gradients import head
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


class Late:
    """Copies as late as a stream of its own may: at the next call, from the memory as it is then."""

    is_here = True

    def __init__(self):
        self.running, self.calls = None, 0

    def serves(self, x):
        return True

    def run(self, x, index, ones, out):
        out.fill_(torch.nan)
        self.calls += 1
        self.running = (x.data_ptr(), x.shape, x.stride(0), x.dtype), index, ones, (out.data_ptr(), out.nbytes)

    def join(self, held):
        if self.running is None:
            return
        (at, (n, d), pitch, dtype), index, ones, (to, size) = self.running
        self.running = None
        memory = (ctypes.c_char * (((n - 1) * pitch + d) * dtype.itemsize)).from_address(at)
        x = torch.frombuffer(bytearray(memory.raw), dtype=dtype).as_strided((n, d), (pitch, 1))
        kept = columns._plain(x, index, ones).contiguous()
        ctypes.memmove(to, kept.data_ptr(), size)
        if [at, to] != [part.data_ptr() for part in held]:
            raise columns.ColumnsMoved("not held")


def late_step(factored, batch, monkeypatch):
    """The step once more with late copies, after it was compiled; and how many copies there were."""
    with factored.attached():
        uses = factored._pass.single_uses(factored.loss, batch, len(batch[0]))
        factored.deferred_step(batch, len(batch[0]), uses)
        side = Late()
        monkeypatch.setattr(columns, "_side", side)
        return factored.deferred_step(batch, len(batch[0]), uses)[0], side.calls


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
    # Each has one layer that is used once and not whole.
    assert [last for *_, last, _ in calls] == [True, True]


class Layers(nn.Module):
    """Three layers in a row or beside each other, with what may go wrong between them."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.turns = how, 0
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return getattr(self, self.how)(x)

    def beside(self, x):
        h = x.sin()
        third, second, first = self.three(h), self.two(h), self.one(h)
        return (first * third).tanh() + second.sin()

    def added_in_place(self, x):
        h = x.sin()
        h += self.one(h).relu()
        h += self.two(h).relu()
        return self.three(h)

    def partly_in_place(self, x):
        h = x * 2
        y = self.one(h)
        h[:, 0] = 0
        return self.three(self.two(y.tanh()) + h)

    def in_place_between_compiled_codes(self, x):
        h = x * 2
        y = self.one(h)
        torch._dynamo.graph_break()
        h.add_(1)
        torch._dynamo.graph_break()
        return self.three(self.two(y.tanh()) + h)

    def without_gradients(self, x):
        with torch.no_grad():
            h = self.one(x).tanh()
        return self.three(self.two(h * 1.5).tanh())

    def unused(self, x):
        h = self.one(x).tanh()
        self.two((h - h.detach()).sqrt())  # an infinite derivative, were it taken
        return self.three(h)

    def another_order(self, x):
        self.turns += 1
        if self.turns <= 2:  # while uses and layers are looked at
            return self.three(self.one(x) + self.two(x))
        second = self.two(x)
        return self.three(self.one(x) + second)


COPIES = {  # beside the pass; the last of each pass is not
    "beside": 4,
    "added_in_place": 4,
    "partly_in_place": 4,
    "without_gradients": 2,
    "unused": 2,
}


def layers(how, **options):
    batch = (torch.randn(N, 7, 8, generator=torch.Generator().manual_seed(1)),)
    return FactoredGradients(
        Layers(how), lambda m, b: m(b[0]).square().sum(dim=(1, 2)), sparsification=MASK, **options
    ), batch


@pytest.mark.parametrize("how", [*COPIES, "in_place_between_compiled_codes"])
def test_late_copies_see_tensors_as_they_were(how, monkeypatch):
    plain, batch = layers(how)
    wanted, _ = plain(batch)
    factored, _ = layers(how, compile=True)
    found, copies = late_step(factored, batch, monkeypatch)
    assert_equal(found, {name: rows.double() for name, rows in wanted.items()})
    assert copies == COPIES.get(how, copies)


def test_a_pass_in_another_order_is_noticed(monkeypatch):
    plain, batch = layers("another_order")
    wanted, _ = plain(batch)
    factored, _ = layers("another_order", compile=True)
    found = step(factored, batch)
    assert_equal(found, {name: rows.double() for name, rows in wanted.items()})
    factored, _ = layers("another_order", compile=True)
    with pytest.raises(columns.ColumnsMoved):
        late_step(factored, batch, monkeypatch)


def own_gradient(x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(x.tanh().sum(), x)[0]


@pytest.mark.parametrize("slope", [own_gradient, torch.func.grad(lambda x: x.tanh().sum())])
def test_a_pass_that_differentiates_by_itself_has_no_chain(slope, calls):
    model, batch, _ = case("mlp")

    def loss(model, batch):
        with torch.enable_grad():
            return cross_entropy(model, (slope(batch[0]), batch[1]))

    wanted, _ = FactoredGradients(model, loss, sparsification=MASK)(batch)
    factored = FactoredGradients(model, loss, sparsification=MASK, compile=True)
    with factored.attached():
        uses = factored._pass.single_uses(loss, batch, N)
    assert uses
    assert not any(use.reached for use in uses.values())
    assert_equal(step(factored, batch), {name: rows.double() for name, rows in wanted.items()})
    assert calls == []


def test_looking_for_the_layers_behind_a_loss_differentiates_nothing(monkeypatch):
    model, batch = make_llama(), make_batch(2)
    wants, portions = [], head._portions
    monkeypatch.setattr(head, "_portions", lambda *given: wants.append(given[5:7]) or portions(*given))
    factored = FactoredGradients(model, head.chunked_causal_loss, sparsification=MASK, compile=True, include_head=True)
    with factored.attached():
        uses = factored._pass.single_uses(factored.loss, batch, 2)
    assert wants == [(False, None)]
    assert [name for name, use in uses.items() if not use.reached] == ["lm_head"]


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
