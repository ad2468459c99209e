"""GPT-2 as transformers builds it, with initial weights from a random stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.sources import grass_data
from grass_lib.rng import Stream

HUB = "openai-community/gpt2"
_ATTENTION = "grass_causal"
_STD = 0.02


@dataclass(frozen=True)
class GPT2Sizes:
    """Sizes of the model; GPT-2 small where nothing is said.

    Attributes:
        layers: Transformer blocks.
        width: Of the residual stream.
        heads: Attention heads.
        vocabulary: Tokens.
        positions: Longest input.

    Raises:
        UsageError: A size is below 1, or ``heads`` does not divide ``width``.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    positions: int = 1024

    def __post_init__(self) -> None:
        if min(self.layers, self.width, self.heads, self.vocabulary, self.positions) < 1 or self.width % self.heads:
            raise UsageError(f"{self}: expected sizes of 1 or more, and heads that divide the width")


def build_gpt2(sizes: GPT2Sizes, dropout: float = 0.0) -> Any:
    """A ``GPT2LMHeadModel`` in evaluation mode; its weights mean nothing until `load_weights`.

    Sequences must not be padded: attention is causal and takes no mask, so that a GPU uses its fastest kernel also
    under ``torch.compile``, where transformers would build a mask.

    Args:
        sizes: Of the model.
        dropout: Of embeddings, attention and residual stream in training mode.

    Raises:
        DataError: The package transformers is missing.
    """
    try:
        from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise DataError("GPT-2 needs transformers, not installed here; run `make setup`") from error
    AttentionInterface.register(_ATTENTION, _causal_attention)
    options: dict[str, Any] = {"attn_implementation": _ATTENTION}
    config = GPT2Config(
        n_layer=sizes.layers,
        n_embd=sizes.width,
        n_head=sizes.heads,
        vocab_size=sizes.vocabulary,
        n_positions=sizes.positions,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    # transformers draws initial weights from the global generators, which are the caller's.
    with torch.random.fork_rng(devices=[]):
        model = GPT2LMHeadModel(config).eval()
    model.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights on the CPU, tied ones once, by name."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a model in place, so that what was compiled for it stays valid.

    Args:
        model: From `build_gpt2`, on any device.
        weights: From `weights_of`.

    Raises:
        DataError: Names or shapes are not those of the model.
    """
    parameters = dict(model.named_parameters())
    wrong = sorted(set(parameters) ^ set(weights)) or [
        name for name, parameter in parameters.items() if parameter.shape != weights[name].shape
    ]
    if wrong:
        raise DataError(
            f"weights do not fit the model: {', '.join(wrong[:3])} missing, unknown or of another shape; expected the "
            f"{len(parameters)} weights of a {type(model).__name__} of the same sizes"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def initial_weights(sizes: GPT2Sizes, stream: Stream) -> dict[str, Tensor]:
    """Initial weights from a stream, distributed as in GPT-2.

    Normal with deviation 0.02, that of the layers which write into the residual stream divided by sqrt(2 layers);
    biases zero, norms one.

    Args:
        sizes: Of the model.
        stream: The model's own stream.

    Returns:
        What `load_weights` takes, computed on the CPU so that every device starts from the same numbers.
    """
    weights: dict[str, Tensor] = {}
    offset = 0
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in build_gpt2(sizes).named_parameters()}
    for name, shape in shapes.items():
        if name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        elif ".ln_" in name:
            weights[name] = torch.ones(shape)
        else:
            std = _STD / (2 * sizes.layers) ** 0.5 if name.endswith("c_proj.weight") else _STD
            weights[name] = stream.normal(tuple(shape), offset=offset).mul_(std)
            offset += shape.numel()
    return weights


def pretrained_weights() -> dict[str, Tensor]:
    """OpenAI's weights of GPT-2 small, from ``GRASS_DATA/gpt2`` where that variable is set, else from the hub.

    Raises:
        DataError: They cannot be had.
    """
    problems = pretrained_problems()
    if problems:
        raise DataError(problems[0])
    folder = grass_data()
    place = HUB if folder is None else str(folder / "gpt2")
    from transformers import GPT2LMHeadModel

    try:
        with torch.random.fork_rng(devices=[]):
            found = GPT2LMHeadModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"GPT-2's weights could not be had from {'the hub' if folder is None else 'GRASS_DATA'} ({HUB}): "
            f"{type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    return weights_of(found)


_REMEDY = (
    f"Put model.safetensors and config.json of {HUB} into GRASS_DATA's folder gpt2/, or run with -p base=scratch, "
    "whose weights are not the paper's"
)


def pretrained_problems() -> list[str]:
    """What keeps the pretrained weights from being had, one sentence each; asks nothing of the network."""
    folder = grass_data()
    if folder is None:
        return []
    missing = [name for name in ("model.safetensors", "config.json") if not (folder / "gpt2" / name).is_file()]
    return [f"GRASS_DATA has no gpt2/{' and no gpt2/'.join(missing)}. {_REMEDY}"] if missing else []


def _refuse_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("attention_mask") is not None:
        raise UsageError("this GPT-2 takes no attention mask; give sequences without padding, one length a batch")


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    found = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return found.transpose(1, 2).contiguous(), None
