"""One compiled block for all: the rows of the plain pass, the model as it was, one code for equal blocks."""

from functools import partial

import pytest
import torch
from tiny_llama import make_batch, make_llama, rows_of
from torch import nn

from grass_lib import InfluenceFunction
from grass_lib.errors import UsageError
from grass_lib.gradients import FactoredGradients, causal_loss, chunked_causal_loss, cross_entropy
from grass_lib.gradients.blocks import CapturedLayer, find_blocks

MASKED = {"sparsification": "random_mask-6*5", "projection": "sjlt-11"}


@pytest.fixture
def graphs(monkeypatch):
    """Numbers of nodes of the graphs that are compiled, by a backend that needs no C++ compiler."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def count(graph, inputs):
        found.append(len(graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


def same(found, wanted):
    for name, rows in wanted.items():
        assert (found[name] - rows).norm() <= 1e-5 * rows.norm(), name


@pytest.mark.parametrize("loss", [chunked_causal_loss, causal_loss])
def test_compiled_blocks_give_the_rows_of_the_plain_pass(graphs, loss):
    model, batch = make_llama(), make_batch()
    names = list(dict(model.named_modules()))
    plain = FactoredGradients(model, causal_loss, include_head=True, **MASKED)
    blocks = FactoredGradients(model, loss, include_head=True, compile="blocks", **MASKED)
    for part in (batch, make_batch(seed=1)):
        wanted, found = plain(part), blocks(part)
        same(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])
    # The first block has nothing below it to differentiate; all others share one code: two forward, two backward.
    assert len(graphs) == 4
    # Batches of another size or length, and other outputs, run as they are.
    last = rows_of(batch, slice(0, 2))
    same(blocks(last)[0], plain(last)[0])
    short = {name: value[:, :6] for name, value in batch.items()}
    same(blocks(short)[0], plain(short)[0])
    same(blocks(batch, output=causal_loss)[0], plain(batch)[0])
    assert len(graphs) == 4
    assert list(dict(model.named_modules())) == names
    assert all(block._compiled_call_impl is None for block in model.model.layers)


@pytest.mark.parametrize("compile", [True, "blocks"])
def test_each_compression_is_compiled_however_many_there_are(graphs, compile):
    model, batch = make_llama(), make_batch()
    seen = []
    with torch._dynamo.config.patch(recompile_limit=2):
        for k in (4, 5, 6, 7):
            graphs.clear()
            FactoredGradients(model, causal_loss, sparsification=f"random_mask-{k}*5", compile=compile)(batch)
            seen.append(len(graphs))
    assert seen[0] >= 2
    assert len(set(seen)) == 1


def test_blocks_of_a_model_with_a_cache_for_generation_share_their_code(graphs):
    model, batch = make_llama(), make_batch()
    FactoredGradients(model, causal_loss, compile="blocks", **MASKED)(batch)
    shared = len(graphs)
    model.config.use_cache = True  # what transformers' models have where nobody says otherwise
    graphs.clear()
    found, _ = FactoredGradients(model, causal_loss, compile="blocks", **MASKED)(batch)
    assert len(graphs) == shared
    assert model.config.use_cache is True
    model.config.use_cache = False
    same(found, FactoredGradients(model, causal_loss, **MASKED)(batch)[0])


def test_nothing_is_differentiated_below_the_lowest_captured_layer(graphs):
    model, batch = make_llama(), make_batch()
    seen = []
    for block in model.model.layers:
        block.register_forward_hook(
            lambda module, args, y: seen.append((y[0] if isinstance(y, tuple) else y).requires_grad)
        )
    FactoredGradients(model, chunked_causal_loss, layers="model.layers.2.mlp.*_proj", **MASKED)(batch)
    assert seen == [False] * 4 + [False, False, True, True]  # behind the pass that looks at the layers


def test_the_model_is_as_it_was_after_an_exception(graphs):
    model, batch = make_llama(), make_batch()
    before = {name: (id(value), value.requires_grad) for name, value in model.named_parameters()}

    def broken(model, batch):
        chunked_causal_loss(model, batch)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        FactoredGradients(model, broken, compile="blocks", **MASKED)(batch)
    assert {name: (id(value), value.requires_grad) for name, value in model.named_parameters()} == before
    assert all(block._compiled_call_impl is None for block in model.model.layers)


def test_influence_functions_take_compiled_blocks(graphs, tmp_path):
    model, batch = make_llama(), make_batch(6)
    train, queries = [rows_of(batch, slice(0, 4)), rows_of(batch, slice(4, 6))], [make_batch(3, seed=2)]
    scores = []
    for name, compile in (("plain", False), ("blocks", "blocks")):
        influence = InfluenceFunction(
            *(model, chunked_causal_loss),
            include_head=True,
            compile=compile,
            store=tmp_path / name,
            progress=False,
            **MASKED,
        )
        influence.cache(train)
        scores.append(influence.attribute(queries, damping=[0.1, 1.0]))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5 * float(scores[0].abs().max()))
    # A target of the same kind reaches the output layer as well.
    targeted = InfluenceFunction(
        *(model, chunked_causal_loss),
        include_head=True,
        store=tmp_path / "plain",
        progress=False,
        target=lambda model, batch, *, head=None: -chunked_causal_loss(model, batch, head=head),
        **MASKED,
    )
    torch.testing.assert_close(targeted.attribute(queries, damping=[0.1, 1.0]), scores[0])


def test_bad_input():
    with pytest.raises(UsageError, match="list of equal blocks"):
        FactoredGradients(nn.Sequential(nn.Linear(3, 3)), causal_loss, compile="blocks")
    assert find_blocks(make_llama()) == "model.layers"
    with pytest.raises(UsageError, match="'blocks'"):
        InfluenceFunction(make_llama(), causal_loss, compile="max-autotune")


class Shared(nn.Module):
    """A block that takes a layer which others have too, and looks at it as models do."""

    def __init__(self, shared):
        super().__init__()
        self.shared, self.own = shared, nn.Linear(6, 6)

    def forward(self, x):
        assert self.shared.in_features == self.shared.out_features == 6
        return x + self.own(torch.tanh(self.shared(input=x)))


class OfShared(nn.Module):
    def __init__(self, alias):
        super().__init__()
        shared = nn.Linear(6, 6)
        if alias == "before":
            self.alias = shared
        self.blocks = nn.ModuleList(Shared(shared if alias == "blocks" else nn.Linear(6, 6)) for _ in range(2))
        if alias == "before":
            self.blocks[0].shared = shared
        if alias == "after":
            self.alias = self.blocks[0].shared
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x if not hasattr(self, "alias") else self.alias(torch.tanh(x)))


@pytest.mark.parametrize("alias", ["blocks", "before", "after"])
@pytest.mark.parametrize("compressed", [{}, {"sparsification": "random_mask-4*5"}])
def test_a_layer_with_several_names_counts_wherever_it_is_used(graphs, alias, compressed):
    torch.manual_seed(0)
    model, batch = OfShared(alias), (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    plain, _ = FactoredGradients(model, cross_entropy, **compressed)(batch)
    found, _ = FactoredGradients(model, cross_entropy, compile="blocks", **compressed)(batch)
    same(found, plain)
    assert all(type(module) is not CapturedLayer for module in model.modules())


def test_modules_that_know_their_model_are_taken(graphs):
    model, batch = OfShared("after"), (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    wanted, _ = FactoredGradients(model, cross_entropy)(batch)
    model.blocks[0].parent = model
    found, _ = FactoredGradients(model, cross_entropy, compile="blocks")(batch)
    same(found, wanted)


class Repeating(nn.Module):
    """A model whose data decide how often it calls a layer, inside its first block or after all of them."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.blocks = nn.ModuleList(Shared(nn.Linear(6, 6)) for _ in range(2))
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        again = bool((x > 0).all())
        for block in self.blocks:
            x = block(x)
        if again and self.where == "block":
            x = self.blocks[1](x)
        x = self.head(x)
        return self.head(torch.tanh(x)) if again and self.where == "head" else x


@pytest.mark.parametrize("where", ["block", "head"])
def test_a_layer_that_a_later_batch_calls_twice_is_refused_where_one_call_was_expected(graphs, where):
    torch.manual_seed(0)
    model, labels = Repeating(where), torch.tensor([0, 1, 2, 0])
    once, twice = (-torch.rand(4, 6), labels), (torch.rand(4, 6) + 0.1, labels)
    plain = FactoredGradients(model, cross_entropy, sparsification="random_mask-4*5")
    found = FactoredGradients(model, cross_entropy, sparsification="random_mask-4*5", compile="blocks")
    same(found(once)[0], plain(once)[0])
    with pytest.raises(UsageError, match=r"is called more than once in this pass.*compile=False"):
        found(twice)
    same(found(once)[0], plain(once)[0])
    # Where the first batch calls it twice, nothing is put off and every later batch is right.
    found = FactoredGradients(model, cross_entropy, sparsification="random_mask-4*5", compile="blocks")
    for batch in (twice, once):
        same(found(batch)[0], plain(batch)[0])
