"""The chunked loss against plain cross-entropy on whole logits, in float64, on a padded Llama."""

from functools import partial

import pytest
import torch
from tiny_llama import VOCABULARY, make_batch, make_llama, rows_of
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.gradients import FactoredGradients, causal_loss, chunked_causal_loss, head
from grass_lib.gradients.head import takes_head
from grass_lib.projection import build_projector

MASKED = {"sparsification": "random_mask-6*5", "projection": "sjlt-11"}


def plain(model, batch):
    """Every sequence's own loss from whole logits, in a loop."""
    losses = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        logits = model(input_ids=ids[None]).logits[0]
        wanted = labels[1:] != -100
        losses.append(functional.cross_entropy(logits[:-1][wanted], labels[1:][wanted], reduction="sum"))
    return torch.stack(losses)


@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_values_and_gradients_are_those_of_plain_cross_entropy(tokens):
    model, batch = make_llama(torch.float64).requires_grad_(False), make_batch()
    found = []
    for loss in (plain, partial(chunked_causal_loss, tokens=tokens)):
        weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_()
        values = loss(model, batch)
        factors = torch.linspace(-1.0, 2.0, len(values), dtype=torch.float64)
        found.append((values.detach(), *torch.autograd.grad(values @ factors, weight)))
        weight.requires_grad_(False)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_mean_is_over_a_sequences_own_tokens():
    model, batch = make_llama(torch.float64), make_batch()
    torch.testing.assert_close(chunked_causal_loss(model, batch, "mean"), causal_loss(model, batch, "mean"))
    batch["labels"][0] = -100
    assert chunked_causal_loss(model, batch, "mean")[0] == 0


def expected(model, batch, name, spec1, k):
    """Rows of a linear layer from its full weight gradient, one sample at a time, then the projectors."""
    weight = dict(model.named_modules())[name].weight.requires_grad_()
    rows = []
    for i in range(len(batch["labels"])):
        (full,) = torch.autograd.grad(plain(model, rows_of(batch, slice(i, i + 1)))[0], weight)
        for side, d in (("output", spec1[0]), ("input", spec1[1])):
            if d >= full.shape[0 if side == "output" else 1]:
                continue
            size = full.shape[0 if side == "output" else 1]
            p = build_projector(f"random_mask-{d}", size, name=f"{name}/{side}", dtype=torch.float64)
            full = p(full.mT).mT if side == "output" else p(full)
        row = full.flatten()
        rows.append(
            row if k >= len(row) else build_projector(f"sjlt-{k}", len(row), name=name, dtype=torch.float64)(row)
        )
    weight.requires_grad_(False)
    return torch.stack(rows).detach()


@pytest.mark.parametrize("head", [False, True])
def test_capture_equals_full_gradients_then_the_projectors(head):
    batch, exact = make_batch(), make_llama(torch.float64)
    factored = FactoredGradients(make_llama(), partial(chunked_causal_loss, tokens=8), include_head=head, **MASKED)
    assert len(factored.sizes) == 4 * 7 + head
    found, _ = factored(batch)
    for name in [*list(factored.sizes)[::5], *(["lm_head"] if head else [])]:
        wanted = expected(exact, batch, name, (6, 5), 11)
        assert (found[name] - wanted).norm() < 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("spec", [MASKED, {"sparsification": "normal-6*5"}, {}], ids=["masked", "dense", "whole"])
def test_the_output_layer_gets_what_the_plain_loss_gives_it(spec):
    model, batch = make_llama(torch.float64), make_batch()
    options = {"layers": ["lm_head", "model.layers.3.*_proj"], "dtype": torch.float64, **spec}
    ours, other = (FactoredGradients(model, loss, **options)(batch)[0] for loss in (chunked_causal_loss, causal_loss))
    assert "lm_head" in ours
    for name, rows in other.items():
        assert rows.norm() > 0
        torch.testing.assert_close(ours[name], rows, rtol=1e-9, atol=1e-11)


def test_rows_do_not_depend_on_batch_mates():
    model, batch = make_llama(torch.float64), make_batch(6)
    factored = FactoredGradients(model, chunked_causal_loss, include_head=True, dtype=torch.float64, **MASKED)
    whole, values = factored(batch)
    for i in range(6):
        alone, value = factored(rows_of(batch, slice(i, i + 1)))
        torch.testing.assert_close(value[0], values[i])
        for name, rows in whole.items():
            torch.testing.assert_close(alone[name][0], rows[i], rtol=1e-9, atol=1e-11)


def test_a_tied_output_layer_gets_its_own_use_only():
    model, batch = make_llama(torch.float64, tied=True), make_batch()
    options = {"include_head": True, "dtype": torch.float64}
    ours, other = (FactoredGradients(model, loss, **options)(batch)[0] for loss in (chunked_causal_loss, causal_loss))
    torch.testing.assert_close(ours["lm_head"], other["lm_head"], rtol=1e-9, atol=1e-11)


def test_logits_are_never_whole():
    """The largest tensor that the loss makes has as many rows as a portion has tokens."""
    model, batch = make_llama(), make_batch()
    largest = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() and result.shape[-1] == VOCABULARY:
                largest.append(result.numel())
            return result

    factored = FactoredGradients(model, partial(chunked_causal_loss, tokens=4), include_head=True, **MASKED)
    with Watch():
        factored(batch)
    assert max(largest) == 4 * VOCABULARY


def test_a_function_around_the_loss_that_hides_the_output_layer_is_refused():
    """Its rows would be zeros otherwise, and nobody would see it."""
    model, batch = make_llama(), make_batch(2)
    factored = FactoredGradients(model, lambda model, batch: 2 * chunked_causal_loss(model, batch), include_head=True)
    with pytest.raises(UsageError, match=r"did not run it as a module.*head="):
        factored(batch)
    rows, _ = FactoredGradients(model, partial(chunked_causal_loss, tokens=4), include_head=True)(batch)
    assert all(bool(part.any()) for part in rows.values())


def test_bad_input():
    model, batch = make_llama(), make_batch()
    assert takes_head(chunked_causal_loss)
    assert takes_head(partial(chunked_causal_loss, tokens=3))
    assert not takes_head(causal_loss)
    with pytest.raises(UsageError, match="tokens is 0"):
        chunked_causal_loss(model, batch, tokens=0)
    with pytest.raises(UsageError, match="reduction is 'none'"):
        chunked_causal_loss(model, batch, "none")
    with pytest.raises(UsageError, match="key 'labels'"):
        chunked_causal_loss(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(UsageError, match="use causal_loss"):
        chunked_causal_loss(torch.nn.Linear(3, 3), batch)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UsageError, match="final_logit_softcapping"):
        chunked_causal_loss(model, batch)


def test_one_compilation_serves_any_number_of_tokens(monkeypatch):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    head._compiled_step.cache_clear()
    try:
        for tokens in range(3, 15):
            logits, labels = torch.randn(tokens, 11), torch.randint(0, 11, (tokens,))
            labels[0] = -100
            for found, wanted in zip(
                head._compiled_step(True)(logits, labels, True), head._step(logits, labels, True), strict=True
            ):
                torch.testing.assert_close(found, wanted)
    finally:
        head._compiled_step.cache_clear()
        torch._dynamo.reset()
    assert len(compiled) == 1
