"""Sizes and settings of the Llama experiment at both scales (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grass_lib.errors import SpecError, UsageError
from grass_lib.specs import CompressionSpec, parse_specs

PHASES = ("cache", "self_influence", "attribute", "retrieve")
"""In their order; each starts from what the ones before left on the disk."""
WEIGHTS = ("pretrained", "random")
SCALES = ("embedded", "paper")


@dataclass(frozen=True)
class Protocol:
    """Sizes and settings of one scale.

    Attributes:
        scale: ``embedded`` or ``paper``.
        weights: ``pretrained``, or ``random`` for measuring speed.
        length: Tokens in a passage, at most.
        max_tokens: Tokens of all passages; at the embedded scale documents decide.
        per_article: Documents of each article at the embedded scale.
        n_prompts: Prompts, from the beginning of the list.
        new_tokens: Longest answer, in tokens.
        last_blocks: Gradients are taken of so many blocks at the end of the model; 0 for all.
        batch_size: Passages in a pass.
        shard_size: Passages in a shard: small enough for two shards in pinned memory.
        spec: The compression.
        damping: Relative, as in the reference.
        top: Passages per side in the gallery.
    """

    scale: str
    weights: str
    length: int
    max_tokens: int
    per_article: int
    n_prompts: int
    new_tokens: int
    last_blocks: int
    batch_size: int
    shard_size: int
    spec: str
    damping: float
    top: int

    def layers(self, n_blocks: int, head: bool) -> str | list[str]:
        """What ``find_layers`` takes for a model of so many blocks, with its output layer or without.

        Where it is a word for all linear layers, ``include_head`` decides on the output layer.
        """
        if not self.last_blocks or self.last_blocks >= n_blocks:
            return "linear"
        blocks = [f"model.layers.{block}.*_proj" for block in range(n_blocks - self.last_blocks, n_blocks)]
        return [*blocks, "lm_head"] if head else blocks

    def compression(self, specs: str = "") -> CompressionSpec:
        """The compression, checked before anything is loaded.

        Args:
            specs: A spec; empty for the scale's own.

        Raises:
            SpecError: It cannot be parsed, is not factored, has a stage 2 that would be left out, or needs mask files.
            UsageError: There is more than one.
        """
        parsed = parse_specs(specs or self.spec)
        if len(parsed) != 1:
            raise UsageError(
                f"specs has {len(parsed)} compressions; expected one, a run of this size does not hold more"
            )
        first = parsed[0].sparsification
        if not (first.is_identity or first.is_factored):
            raise SpecError(
                f"{parsed[0]} sparsifies whole gradients; expected a factored one such as {first.family}-128*128"
            )
        parsed[0].check_shorter()
        if parsed[0].needs_mask_file:
            raise SpecError(f"{parsed[0]} needs mask files, and this experiment has none; use random_mask instead")
        return parsed[0]


def protocol(scale: str, *, weights: str = "pretrained", max_tokens: int = 0, batch_size: int = 0) -> Protocol:
    """The protocol of a scale.

    Args:
        scale: ``embedded`` (a CPU, two minutes) or ``paper``.
        weights: ``pretrained``, or ``random`` at paper scale.
        max_tokens: Tokens of all passages at paper scale; 0 for a million, as the paper measures its throughput.
        batch_size: Passages in a pass; 0 for the scale's own.

    Raises:
        UsageError: There is no such scale or kind of weights, or a number cannot be used.
    """
    if scale not in SCALES:
        raise UsageError(f"scale is {scale!r}; expected one of {', '.join(SCALES)}")
    if weights not in WEIGHTS:
        raise UsageError(f"weights is {weights!r}; expected one of {', '.join(WEIGHTS)}")
    if max_tokens < 0 or batch_size < 0:
        raise UsageError(
            f"max_tokens is {max_tokens} and batch_size {batch_size}; expected 0 for the scale's own, or more"
        )
    if scale == "paper":
        size = batch_size or 8
        return Protocol(
            scale=scale,
            weights=weights,
            length=1024,
            max_tokens=max_tokens or 1_000_000,
            per_article=0,
            n_prompts=12,
            new_tokens=200,
            last_blocks=0,
            batch_size=size,
            shard_size=max(256 // size * size, size),
            spec="random_mask-128*128->sjlt-4096",
            damping=1.0,
            top=2,
        )
    if weights != "pretrained" or max_tokens:
        raise UsageError(
            f"weights={weights}, max_tokens={max_tokens} are for scale=paper; the embedded scale has its own"
        )
    size = batch_size or 5
    return Protocol(
        scale=scale,
        weights=weights,
        length=96,
        max_tokens=0,
        per_article=5,
        n_prompts=5,
        new_tokens=24,
        last_blocks=6,
        batch_size=size,
        shard_size=max(20 // size * size, size),
        spec="random_mask-128*128->sjlt-4096",
        damping=1.0,
        top=4,
    )


def parse_phases(text: str) -> tuple[str, ...]:
    """The phases to run, in their order.

    Args:
        text: ``all``, or names with commas between them.

    Raises:
        UsageError: A name is not one of `PHASES`.
    """
    names: Sequence[str] = PHASES if text == "all" else [name.strip() for name in text.split(",")]
    wrong = [name for name in names if name not in PHASES]
    if wrong:
        raise UsageError(f"phase is {text!r}; expected all, or some of {', '.join(PHASES)} with commas between them")
    return tuple(name for name in PHASES if name in names)
