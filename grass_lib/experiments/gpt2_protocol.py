"""Sizes, grids and recipes of GPT-2 + WikiText-2 at both scales (section 4.2 of the paper)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from grass_lib.errors import SpecError, UsageError
from grass_lib.experiments.data import wikitext
from grass_lib.experiments.gpt2_trainer import TextRecipe
from grass_lib.experiments.models.gpt2 import GPT2Sizes
from grass_lib.specs import CompressionSpec, StageSpec, parse_specs

RELATIVE_DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Times the mean eigenvalue of each layer's curvature."""
BASES = ("pretrained", "scratch")
WIKIPEDIA = "wikipedia"
"""Data of the embedded scale."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, grids and recipes of one scale.

    Attributes:
        scale: ``embedded`` or ``paper``.
        data: ``wikitext-2-raw-v1``, ``validation+test``, or ``wikipedia`` at the embedded scale.
        base: Weights that fine-tuning starts from: ``pretrained``, or trained from ``scratch`` first.
        length: Tokens in a block.
        n_train: Blocks to fine-tune on.
        n_query: Query blocks; a tenth of them chooses the damping.
        n_base: Blocks that a base model is trained on.
        n_lds: Models that LDS is measured on.
        second_seed_share: Share of their subsets trained with a second seed.
        group_size: Models in the unit of resume.
        sizes: Of the model.
        recipe: How models are fine-tuned.
        base_recipe: How a base model is trained from scratch.
        ks: Compressed sizes of a layer, squares.
        families: Types of stage 1 without a stage 2.
        factgrass: Masks of stage 1 before an SJLT.
        dampings: Grid of relative damping.
    """

    scale: str
    data: str
    base: str
    length: int
    n_train: int
    n_query: int
    n_base: int
    n_lds: int
    second_seed_share: float
    group_size: int
    sizes: GPT2Sizes
    recipe: TextRecipe
    base_recipe: TextRecipe
    ks: tuple[int, ...]
    families: tuple[str, ...] = ("random_mask", "selective_mask", "sjlt", "normal")
    factgrass: tuple[str, ...] = ("random_mask", "selective_mask")
    dampings: tuple[float, ...] = RELATIVE_DAMPINGS

    @property
    def weights(self) -> str:
        """``official`` for OpenAI's weights, ``substitute`` for a base model trained here."""
        return "official" if self.base == "pretrained" else "substitute"

    def specs(self) -> tuple[str, ...]:
        """The compressions to compare, size by size: masks, sjlt, LoGra and FactGraSS, masks random and selective."""
        found = []
        for k in self.ks:
            side = math.isqrt(k)
            found += [f"{family}-{side}*{side}->identity" for family in self.families]
            found += [f"{mask}-{2 * side}*{2 * side}->sjlt-{k}" for mask in self.factgrass]
        return tuple(found)

    def damping_grid(self) -> tuple[float, ...]:
        """The relative damping values to choose from."""
        return self.dampings

    def compressions(self, specs: str = "") -> list[CompressionSpec]:
        """The compressions to compare, checked against the model, so that a wrong one fails before any training.

        Args:
            specs: Specs with commas between them; empty for the scale's own.

        Raises:
            SpecError: A spec cannot be parsed or does not fit the layers.
        """
        parsed = parse_specs(specs or self.specs())
        for spec in parsed:
            self._check_spec(spec)
        return parsed

    def _check_spec(self, spec: CompressionSpec) -> None:
        first, width = spec.sparsification, self.sizes.width
        if not (first.is_identity or first.is_factored):
            raise SpecError(
                f"{spec} sparsifies whole gradients, and this experiment compresses layer by layer; expected a "
                f"factored sparsification such as {first.family}-64*64, or identity"
            )
        if spec.projection.needs_mask_file:
            raise SpecError(f"{spec} has a selective mask as its stage 2; masks of layers are a stage 1")
        spec.check_shorter()
        if not first.is_mask:
            for side in first.dims:
                # The shortest side of all layers; masks keep what there is, other types may not be able to.
                StageSpec(first.family, (side,), first.param).check_input(width)
        size = first.k if first.k is not None else width * (width + 1)
        if spec.projection.k is not None and spec.projection.k < size:
            spec.projection.check_input(size)


def protocol(scale: str, *, n_lds: int = 0, data: str = wikitext.OFFICIAL, base: str = "pretrained") -> Protocol:
    """The protocol of a scale.

    Args:
        scale: ``embedded`` (a CPU, two minutes, a tiny model on Wikipedia articles) or ``paper``.
        n_lds: Another number of LDS models; 0 for the scale's own.
        data: At paper scale ``wikitext-2-raw-v1`` or its substitute ``validation+test``; the embedded scale has its own
            text.
        base: At paper scale ``pretrained`` or ``scratch``; the embedded scale always trains its own.

    Raises:
        UsageError: There is no such scale, data or base, or the number is negative or too small.
    """
    check_scale(scale)
    wikitext.check_data(data)
    if base not in BASES:
        raise UsageError(f"base is {base!r}; expected one of {', '.join(BASES)}")
    if n_lds < 0 or n_lds in (1, 2):
        raise UsageError(f"n_lds is {n_lds}; expected 0 for the scale's own number, or at least 3 models")
    if scale == "embedded":
        if data != wikitext.OFFICIAL:
            raise UsageError(f"data is {data!r}, which is for scale=paper; the embedded scale has its own text")
        chosen = Protocol(
            scale=scale,
            data=WIKIPEDIA,
            base="scratch",
            length=128,
            n_train=256,
            n_query=50,
            n_base=3072,
            n_lds=10,
            second_seed_share=0.5,
            group_size=1,
            sizes=GPT2Sizes(layers=2, width=64, heads=4, vocabulary=1024, positions=128),
            recipe=TextRecipe(lr=1e-3, batch_size=4),
            base_recipe=TextRecipe(
                lr=3e-3, epochs=1, batch_size=4, schedule="cosine", warmup=0.05, reshuffle=True, dropout=0.0
            ),
            ks=(16, 64, 256),
            factgrass=("random_mask",),
        )
    else:
        n_train, n_query = wikitext.SIZES[data]
        chosen = Protocol(
            scale=scale,
            data=data,
            base=base,
            length=wikitext.LENGTH,
            n_train=n_train,
            n_query=n_query,
            n_base=n_train,
            n_lds=50,
            second_seed_share=0.5,
            group_size=1,
            sizes=GPT2Sizes(),
            recipe=TextRecipe(),
            base_recipe=TextRecipe(lr=3e-4, epochs=10, schedule="cosine", warmup=0.05, reshuffle=True),
            ks=(256, 1024, 4096),
        )
    return replace(chosen, n_lds=n_lds or chosen.n_lds)


def check_scale(scale: str) -> None:
    """Raises UsageError for a scale that there is not."""
    if scale not in ("embedded", "paper"):
        raise UsageError(f"scale is {scale!r}; expected one of embedded, paper")
