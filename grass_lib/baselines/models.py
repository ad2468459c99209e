"""The model of a workload, as every worker builds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.baselines.workload import ModelShape
from grass_lib.errors import BaselineError
from grass_lib.experiments.models.gpt2 import GPT2Sizes, build_gpt2, load_weights
from grass_lib.gradients.layers import find_layers


def build_model(shape: ModelShape, weights: Mapping[str, Tensor] | None, device: str) -> Any:
    """A language model in evaluation mode whose linear layers are all ``torch.nn.Linear``.

    Args:
        shape: Of the model.
        weights: Of GPT-2, by name; None for random ones.
        device: Where to put it.

    Raises:
        BaselineError: Weights were given for a model that takes random ones only.
    """
    if shape.kind == "llama":
        if weights is not None:
            raise BaselineError("a llama workload has random weights; expected weights=None")
        return _random_llama(shape, device)
    torch.manual_seed(shape.seed)
    model = build_gpt2(GPT2Sizes(**shape.sizes))
    if weights is None:
        model.apply(model._init_weights)
    else:
        load_weights(model, weights)
    linear_layers(model)
    return model.to(device=device, dtype=getattr(torch, shape.dtype)).eval()


def layer_names(model: nn.Module) -> list[str]:
    """The layers that every system is told to look at: all linear ones but the output layer."""
    return list(find_layers(model, "linear"))


def linear_layers(model: nn.Module) -> None:
    """Exchanges the transposed linear layers of GPT-2, in place, for ``torch.nn.Linear`` with the same weights."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
            continue
        layer: Any = module
        weight, bias = layer.weight, layer.bias
        linear = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None)
        with torch.no_grad():
            linear.weight.copy_(weight.mT)
            if bias is not None:
                linear.bias.copy_(bias)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear)


def sequence_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy ``(n,)`` of each sequence, summed over the tokens that are predicted.

    Args:
        model: Gives an object with ``.logits``.
        ids: ``(n, length)``, on the model's device.
    """
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).sum(dim=1)


def _random_llama(shape: ModelShape, device: str) -> Any:
    """Made on the device in its own type: 8 billion float32 weights on the host would take 32 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {**shape.sizes, "use_cache": False}
    before = torch.get_default_dtype()
    torch.manual_seed(shape.seed)
    torch.set_default_dtype(getattr(torch, shape.dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**options))
    finally:
        torch.set_default_dtype(before)
    return model.eval()
