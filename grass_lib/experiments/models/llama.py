"""Models of the Llama architecture: sizes, random weights, a local folder or the hub, and a GGUF file's weights."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data.sources import grass_data
from grass_lib.experiments.models.gguf import GGUFFile
from grass_lib.rng import Stream

HUB = "meta-llama/Llama-3.1-8B-Instruct"
FOLDER = "llama3"
"""Folder of ``GRASS_DATA`` with the model's files as the hub has them."""


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a model; Llama-3.1-8B where nothing is said.

    Attributes:
        layers: Decoder layers.
        width: Of the residual stream.
        feed_forward: Of the hidden layer between.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocabulary: Tokens.
        positions: Longest input.
        tied: Whether the output layer shares the embedding's matrix.
        rope_theta: Base of the rotary embedding.
        rope_scaling: Whether it is Llama 3.1's for long contexts.
        norm_eps: Of the norms.

    Raises:
        UsageError: A size is below 1, or heads do not divide each other and the width.
    """

    layers: int = 32
    width: int = 4096
    feed_forward: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    positions: int = 131072
    tied: bool = False
    rope_theta: float = 500000.0
    rope_scaling: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.layers, self.width, self.feed_forward, self.heads, self.kv_heads, self.vocabulary, self.positions)
        if min(sizes) < 1 or self.width % self.heads or self.heads % self.kv_heads:
            raise UsageError(
                f"{self}: expected sizes of 1 or more, heads that divide the width, kv_heads that divide heads"
            )

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers, the output layer included: what a token is multiplied with."""
        kv = self.width // self.heads * self.kv_heads
        block = 2 * self.width * (self.width + kv) + 3 * self.width * self.feed_forward
        return self.layers * block + self.vocabulary * self.width


SHAPES = {
    "llama-3.1-8b": LlamaSizes(),
    "llama-3.1-70b": LlamaSizes(layers=80, width=8192, feed_forward=28672, heads=64),
    "smollm2-135m": LlamaSizes(
        layers=30,
        width=576,
        feed_forward=1536,
        heads=9,
        kv_heads=3,
        vocabulary=49152,
        positions=8192,
        tied=True,
        rope_theta=100000.0,
        rope_scaling=False,
    ),
    "tiny": LlamaSizes(
        layers=4,
        width=64,
        feed_forward=160,
        heads=4,
        kv_heads=2,
        vocabulary=512,
        positions=256,
        rope_theta=10000.0,
        rope_scaling=False,
    ),
}
"""Shapes that have a name."""


def llama_config(sizes: LlamaSizes) -> Any:
    """The configuration of transformers for some sizes.

    Raises:
        DataError: The package transformers is missing.
    """
    transformers = _transformers()
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    if sizes.rope_scaling:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 8192
    return transformers.LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.positions,
        rms_norm_eps=sizes.norm_eps,
        tie_word_embeddings=sizes.tied,
        rope_parameters=rope,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_llama(config: Any, *, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A causal language model with random weights, made where it will run.

    Args:
        config: Of transformers, for any architecture that it knows.
        device: Where it is made.
        dtype: Of its weights.
        seed: Of its weights; they are those of transformers' own initialisation.

    Raises:
        DataError: The package transformers is missing.
    """
    transformers, place = _transformers(), torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def initial_llama(sizes: LlamaSizes, stream: Stream) -> Any:
    """A small model on the CPU whose initial weights come from a stream: normal with deviation 0.02, norms one.

    Args:
        sizes: Of the model.
        stream: The model's own.
    """
    model = random_llama(llama_config(sizes), device="cpu", dtype=torch.float32)
    offset = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            parameter.copy_(stream.normal(tuple(parameter.shape), offset=offset).mul_(0.02))
            offset += parameter.numel()
    return model


def llama_from_gguf(file: GGUFFile) -> Any:
    """The model of a GGUF file in float32, its few-bit weights expanded.

    Args:
        file: Of architecture ``llama``.

    Raises:
        DataError: It is of another architecture, or a tensor is missing or of another shape.
    """
    given, kind = file.metadata, file.metadata.get("general.architecture")
    if kind != "llama":
        raise DataError(f"{file.path.name} holds a model of architecture {kind!r}; expected 'llama'")
    sizes = LlamaSizes(
        layers=given["llama.block_count"],
        width=given["llama.embedding_length"],
        feed_forward=given["llama.feed_forward_length"],
        heads=given["llama.attention.head_count"],
        kv_heads=given["llama.attention.head_count_kv"],
        vocabulary=file.places["token_embd.weight"].shape[0],
        positions=given["llama.context_length"],
        tied="output.weight" not in file.places,
        rope_theta=given["llama.rope.freq_base"],
        rope_scaling=False,
        norm_eps=given["llama.attention.layer_norm_rms_epsilon"],
    )
    model = random_llama(llama_config(sizes), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = _gguf_tensor(file, name, sizes)
            if found.shape != parameter.shape:
                raise DataError(
                    f"{file.path.name}: {name} has shape {tuple(found.shape)}; expected {tuple(parameter.shape)} from "
                    "its own metadata, fetch the file again"
                )
            parameter.copy_(found)
    return model


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _gguf_tensor(file: GGUFFile, name: str, sizes: LlamaSizes) -> Tensor:
    own = name.removesuffix(".weight")
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if own in fixed:
        return file.tensor(f"{fixed[own]}.weight")
    _, _, block, part = own.split(".", 3)
    found = file.tensor(f"blk.{block}.{_GGUF_NAMES[part]}.weight")
    heads = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.kv_heads}.get(part)
    if heads is None:
        return found
    # llama.cpp rotates neighbouring pairs of a head's rows, transformers its two halves: rows go back in their order.
    return found.view(heads, -1, 2, found.shape[1]).transpose(1, 2).reshape(found.shape)


def pretrained_llama(device: str | torch.device, dtype: torch.dtype) -> tuple[Any, Any, str]:
    """Llama-3.1-8B-Instruct from ``GRASS_DATA/llama3`` where it is there, else from the hub.

    A local folder may hold any causal language model of transformers with its tokenizer.

    Args:
        device: Where the model goes.
        dtype: Of its weights.

    Returns:
        Model, tokenizer of transformers, and where they come from.

    Raises:
        DataError: They cannot be had.
    """
    transformers, folder = _transformers(), llama_folder()
    place, origin = (HUB, f"{HUB} from the hub") if folder is None else (str(folder), f"GRASS_DATA/{FOLDER}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
        with torch.random.fork_rng(devices=[]):
            model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{origin} could not be loaded: {type(error).__name__}: {error}. {REMEDY}") from error
    model.config.use_cache = False
    return model.to(device).eval(), tokenizer, origin


REMEDY = (
    f"Put the model's files into GRASS_DATA's folder {FOLDER}/, ask for access at https://huggingface.co/{HUB} and log "
    "in with `hf auth login`, or measure throughput with -p weights=random -p phase=cache"
)


def llama_folder() -> Path | None:
    """The folder of ``GRASS_DATA`` with the model; None where it comes from the hub."""
    data = grass_data()
    folder = None if data is None else data / FOLDER
    return folder if folder is not None and (folder / "config.json").is_file() else None


def llama_problems() -> list[str]:
    """What keeps the pretrained model from being had, one sentence each.

    Downloads nothing; where there is a token, the hub is asked whether it may read the model.
    """
    if importlib.util.find_spec("transformers") is None:
        return ["Llama needs transformers, not installed here; run `make setup`"]
    if llama_folder() is not None:
        return []
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return [f"HF_HUB_OFFLINE is on and GRASS_DATA has no {FOLDER}/config.json. {REMEDY}"]
    state, reason = hub_access(HUB)
    return [] if state else [f"{reason}. {REMEDY}"]


def hub_access(name: str) -> tuple[bool, str]:
    """Whether this machine's token may read a gated model of the hub, and what was found; nothing is downloaded.

    Args:
        name: Of the model.
    """
    try:
        from httpx import HTTPError
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return False, "huggingface_hub is not installed here; run `make setup`"
    if not get_token():
        return False, f"{name} is gated, and there is no token of the Hugging Face hub here"
    try:
        HfApi().auth_check(name)
    except HfHubHTTPError as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        return False, f"the token that is here may not read {name} (answer {code})"
    except (OSError, RuntimeError, HTTPError) as error:
        return False, f"the hub could not be asked about {name} ({type(error).__name__})"
    return True, f"the token that is here may read {name}"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DataError("Llama needs transformers, not installed here; run `make setup`") from error
    return transformers
