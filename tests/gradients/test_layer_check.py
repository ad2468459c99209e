"""What is looked at before layers are captured: samples on dimension 0, and forward passes of a class's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.gradients import FactoredGradients, cross_entropy

N = 5
LABELS = torch.tensor([0, 1, 2, 0, 1])


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 4


class Sliding(nn.Embedding):
    def forward(self, x, gap=2):
        return functional.embedding(x + gap, self.weight)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.mT).mT


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias)


class Padding(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


class Tripled(nn.Linear):
    def forward(self, x):
        return functional.linear(3 * x, self.weight, self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Pair(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y


class OtherRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * functional.normalize(x.tanh(), dim=-1)


class PlusOne(nn.LayerNorm):
    def forward(self, x):
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Adapted(nn.Linear):
    """As adapters of low rank are written: something beside the weight, which changes nothing about it."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.A, self.B = nn.Parameter(torch.randn(2, d_in)), nn.Parameter(torch.randn(d_out, 2))

    def forward(self, x):
        return functional.linear(x, self.weight, self.bias) + x @ self.A.mT @ self.B.mT


class InPlace(torch.autograd.Function):
    """A product with a weight whose backward pass puts its result where the gradient was."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, *gradients):
        (x, weight), (delta,) = ctx.saved_tensors, gradients
        found = (delta * x).sum(dim=tuple(range(x.dim() - 1)))
        return delta.mul_(weight), found


class WritingRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-5

    def forward(self, x):
        return InPlace.apply(x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps), self.weight)


class Packed(nn.Linear):
    """As weights of four bits are kept: other numbers in another shape, made to weights when the layer runs."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.real = self.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(d_in * d_out // 4, 1))

    def forward(self, x):
        return functional.linear(x, self.real, self.bias)


class Elsewhere(nn.Linear):
    """As weights on another device are: there while the layer runs."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.real, self.weight = self.weight, nn.Parameter(self.weight.detach().to("meta"))

    def forward(self, x):
        return functional.linear(x, self.real, self.bias)


class Scheme(nn.Module):
    """A layer and a head on the mean over everything between samples and features."""

    def __init__(self, layer, width):
        super().__init__()
        self.head, self.layer = nn.Linear(width, 3), layer

    def forward(self, x):
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        y = y.flatten(2).mT if isinstance(self.layer, nn.Conv2d) else y
        return self.head(torch.tanh(y.flatten(1, -2).mean(dim=1)))


TOKENS, IDS, IMAGES = torch.randn(N, 8, 8), torch.randint(0, 9, (N, 4)), torch.randn(N, 2, 6, 6)
OTHERS = [
    (Scaled(9, 8), 8, IDS),
    (Sliding(11, 8), 8, IDS),
    (ChannelsFirst(8), 8, TOKENS),
    (Standardised(2, 4, 3), 4, IMAGES),
    (Padding(2, 4, 3), 4, IMAGES),
    (Tripled(8, 6), 6, TOKENS),
    (Activated(8, 6), 6, TOKENS),
    (Pair(8, 6), 6, TOKENS),
    (OtherRMSNorm(8), 8, TOKENS),
]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("layer", "width", "x"), OTHERS, ids=lambda part: type(part).__name__)
def test_layers_that_compute_something_else_are_refused(layer, width, x, compile):
    factored = FactoredGradients(Scheme(layer, width), cross_entropy, layers="all", compile=compile)
    for _ in range(2):
        with pytest.raises(UsageError, match=rf"layer 'layer' \({type(layer).__name__}\) cannot be captured.*layers="):
            factored((x, LABELS))
    assert all(not module._forward_pre_hooks for module in factored.model.modules())
    assert all(parameter.requires_grad for parameter in factored.model.parameters())
    rows, _ = FactoredGradients(factored.model, cross_entropy, layers="head")((x, LABELS))
    assert rows["head"].any()


@pytest.mark.parametrize(("layer", "width"), [(PlusOne(8), 8), (Adapted(8, 6), 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_differ_in_nothing_that_counts_are_taken(layer, width, dtype):
    model = Scheme(layer, width).to(dtype)
    random = torch.get_rng_state()
    rows, _ = FactoredGradients(model, cross_entropy, layers="layer")((TOKENS.to(dtype), LABELS))
    assert torch.equal(torch.get_rng_state(), random)
    wide = model.double()
    for i in range(N):
        value = cross_entropy(wide, (TOKENS[i : i + 1].double(), LABELS[i : i + 1])).sum()
        weight, bias = torch.autograd.grad(value, [wide.layer.weight, wide.layer.bias])
        one = torch.cat([weight.reshape(len(weight), -1), bias[:, None]], dim=1).flatten()
        assert (rows["layer"][i].double() - one).norm() < (1e-5 if dtype == torch.float32 else 0.1) * one.norm()


@pytest.mark.parametrize("layer", [WritingRMSNorm(8), Packed(8, 6), Elsewhere(8, 6)])
def test_layers_of_which_nobody_can_tell_are_taken(layer):
    width = 8 if isinstance(layer, WritingRMSNorm) else 6
    rows, _ = FactoredGradients(Scheme(layer, width), cross_entropy, layers="layer")((TOKENS, LABELS))
    assert rows["layer"].any()


def test_a_damaged_sample_is_not_the_layers_fault():
    for bad in (float("nan"), float("inf")):
        x = TOKENS.clone()
        x[0, 0, 0] = bad
        rows, _ = FactoredGradients(Scheme(PlusOne(8), 8), cross_entropy, layers="layer")((x, LABELS))
        assert not rows["layer"][0].isfinite().all()
        assert rows["layer"][1:].isfinite().all()


def test_a_layer_that_is_called_later_is_looked_at_then():
    class Sometimes(Scheme):
        def forward(self, x):
            return super().forward(x) if x[0, 0, 0] > 0 else self.head(x[:, 0, :6])

    factored = FactoredGradients(Sometimes(Tripled(8, 6), 6), cross_entropy, layers="linear")
    factored((-TOKENS.abs(), LABELS))
    with pytest.raises(UsageError, match=r"layer 'layer' \(Tripled\) cannot be captured"):
        factored((TOKENS.abs(), LABELS))


def test_an_output_layer_of_its_own_kind_is_refused_by_the_chunked_loss():
    from tiny_llama import make_batch, make_llama

    from grass_lib.gradients import chunked_causal_loss

    model = make_llama()
    head = Tripled(model.lm_head.in_features, model.lm_head.out_features)
    head.bias = None
    model.lm_head = head
    with pytest.raises(UsageError, match="Tripled with a forward of its own, which chunked_causal_loss leaves out"):
        FactoredGradients(model, chunked_causal_loss, layers="linear")(make_batch())


def test_models_of_transformers_are_taken():
    from transformers import LlamaConfig, LlamaForCausalLM

    from grass_lib.gradients import causal_loss

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    ids = torch.randint(0, 32, (2, 7))
    rows, _ = FactoredGradients(model, causal_loss, layers="norm")({"input_ids": ids, "labels": ids})
    assert len(rows) == 5
    assert all(part.any() for part in rows.values())


class Positions(nn.Module):
    """As nanoGPT has them: looked up once for all samples."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(9, 8), nn.Embedding(N, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.tokens(ids) + self.places(torch.arange(ids.shape[1]))).mean(dim=1))


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x.transpose(0, 1))).mean(dim=0))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("model", "x", "name"),
    [(Positions(), torch.randint(0, 9, (N, N)), "places"), (TokensFirst(), torch.randn(N, N, 8), "hidden")],
)
def test_a_batch_with_as_many_samples_as_tokens_hides_nothing(model, x, name, compile):
    factored = FactoredGradients(model, cross_entropy, layers="all", compile=compile)
    for _ in range(2):
        with pytest.raises(UsageError, match=f"layer '{name}'.*of 1 sample; expected samples on dimension 0"):
            factored((x, LABELS))
    factored = FactoredGradients(model, cross_entropy, layers="head")
    for n in (1, N):
        rows, _ = factored((x[:n], LABELS[:n]))
        assert rows["head"].any()


def test_a_model_that_cannot_take_one_sample_is_taken():
    class Crowd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = PlusOne(8), nn.Linear(8, 3)

        def forward(self, x):
            if len(x) < 2:
                raise RuntimeError("too few")
            return self.head(torch.tanh(self.layer(x)).mean(dim=1))

    rows, _ = FactoredGradients(Crowd(), cross_entropy, layers="all")((TOKENS, LABELS))
    assert rows["layer"].any()


def test_what_was_looked_at_is_not_looked_at_again():
    model = Scheme(PlusOne(8), 8)
    calls = []
    model.register_forward_hook(lambda module, args, y: calls.append(len(args[0])))
    factored = FactoredGradients(model, cross_entropy, layers="all")
    for n in (1, 1, N, N):
        factored((TOKENS[:n], LABELS[:n]))
    assert calls == [1, 1, 1, 1, N, N]  # the kind at the first batch, dimension 0 at the first of several samples
