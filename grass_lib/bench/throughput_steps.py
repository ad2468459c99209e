"""The steps that `grass bench throughput` compares, each a function of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.gradients.blocks import CompiledBlocks
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.head import chunked_causal_loss
from grass_lib.gradients.language import causal_loss
from grass_lib.gradients.layers import find_layers
from grass_lib.gradients.state import evaluating
from grass_lib.projection.sjlt import SJLTProjector

Batch = Mapping[str, Tensor]
Step = Callable[[Batch], Any]


@contextmanager
def plain_step(model: Any) -> Iterator[Step]:
    """Forward and backward pass of transformers' model to the embeddings' output: all weights frozen, not compiled."""
    embedding = model.get_input_embeddings()
    with _frozen(model):

        def step(batch: Batch) -> Tensor:
            embedded = embedding(batch["input_ids"]).detach().requires_grad_()
            values = causal_loss(model, {"inputs_embeds": embedded, "labels": batch["labels"]})
            return torch.autograd.grad(values.sum(), embedded)[0]

        yield step


@contextmanager
def bare_step(model: Any) -> Iterator[Step]:
    """Ours without capture: compiled blocks, chunked loss, backward pass to the embeddings' output."""
    embedding, blocks = model.get_input_embeddings(), CompiledBlocks(model, {})
    compiled = torch.device(next(model.parameters()).device).type == "cuda"
    with _frozen(model):

        def step(batch: Batch) -> Tensor:
            embedded = embedding(batch["input_ids"]).detach().requires_grad_()
            with blocks.probing({}, {}, compiled=compiled):
                values = chunked_causal_loss(model, {"inputs_embeds": embedded, "labels": batch["labels"]})
            return torch.autograd.grad(values.sum(), embedded)[0]

        yield step


@contextmanager
def reference_step(model: Any, gradients: FactoredGradients) -> Iterator[Step]:
    """A step as the reference system takes it, eagerly and layer by layer.

    Every linear layer keeps its whole input; its backward pass always computes the gradient of the input, then takes
    the kept columns of both sides, contracts, and projects, one layer after the other. Embeddings and norms are
    trainable, so that their gradients are computed too, and the logits of the batch are held together. Nothing is
    copied to the host or written: the reference is a little slower still.

    Args:
        model: The model.
        gradients: Whose masks and sjlt are used.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        stack.callback(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        for name in gradients.sizes:
            module = modules[name]
            stack.callback(module.__dict__.pop, "forward", None)
            module.forward = _reference_forward(name, module, gradients, found)

        def step(batch: Batch) -> dict[str, Tensor]:
            found.clear()
            model.zero_grad(set_to_none=True)
            logits = model(input_ids=batch["input_ids"]).logits
            following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), following.flatten()).backward()
            return dict(found)

        yield step
        model.zero_grad(set_to_none=True)


def _reference_forward(name: str, module: Any, gradients: FactoredGradients, found: dict[str, Tensor]) -> Any:
    out, into = gradients.sides(name)
    second = gradients.stage2(name)

    def compress(delta: Tensor, x: Tensor) -> Tensor:
        left = delta * len(delta)
        left = left @ out.matrix.to(left) if out.matrix is not None else left
        left = left.index_select(-1, out.index) if out.index is not None else left
        right = x @ into.matrix.to(x) if into.matrix is not None else x
        right = right.index_select(-1, into.index) if into.index is not None else right
        flat = torch.einsum("bsi,bsj->bij", left, right).flatten(1)
        if isinstance(second, SJLTProjector):
            signed = flat.float()[:, :, None] * second.signs
            return flat.new_zeros(len(flat), second.k, dtype=torch.float32).index_add_(
                1, second.destinations.flatten().long(), signed.flatten(1)
            )
        return flat if second is None else second(flat.float())

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return torch.nn.functional.linear(x, weight)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            x, weight = ctx.saved_tensors
            with torch.no_grad():
                found[name] = compress(grads[0], x)
            return grads[0] @ weight, None

    return lambda x: Whole.apply(x, module.weight)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def arithmetic(model: Any, block: int) -> float:
    """Floating-point operations a token of a forward pass and a backward pass to the activations, at least.

    Two for each weight of a linear layer and pass, the output layer included; attention over half the block, its
    backward pass two and a half times its forward pass.

    Args:
        model: Of transformers.
        block: Tokens in a block.
    """
    layers = find_layers(model, "linear", include_head=True)
    weights = sum(shape.d_out * (shape.d_in - shape.bias) for shape in layers.values())
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return operations(weights, config.num_hidden_layers, config.num_attention_heads * head, block)


def operations(weights: int, layers: int, width: int, block: int) -> float:
    """Floating-point operations a token; see `arithmetic`.

    Args:
        weights: Of the linear layers.
        layers: With attention.
        width: Of all heads together.
        block: Tokens in a block.
    """
    return 4.0 * weights + layers * 2.0 * block * width * (1 + 2.5)
