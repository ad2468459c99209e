"""Sizes, grids and recipe of Music Transformer + MAESTRO at both scales (the appendix's small-scale protocol)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from grass_lib.errors import SpecError, UsageError
from grass_lib.experiments.banks import check_models
from grass_lib.experiments.data import maestro
from grass_lib.experiments.models.music_transformer import MusicSizes, parameter_count
from grass_lib.experiments.music_trainer import MusicRecipe
from grass_lib.specs import CompressionSpec, parse_specs

DAMPINGS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Relative values, and for ``convention="paper"`` the absolute ones that the published rows were chosen from."""
CONVENTIONS = ("relative", "paper")
MASKS = ("energy", "")
"""How the coordinates of selective types are chosen: those with the largest mean square, or not at all."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, grids and recipe of one scale.

    Attributes:
        scale: ``embedded`` or ``paper``.
        sizes: Of the model.
        n_train: Training windows.
        n_query: Query windows; a tenth of them chooses the damping.
        n_lds: Models that LDS is measured on.
        n_trak: Models that TRAK uses.
        second_seed_share: Share of the LDS subsets trained with a second seed.
        group_size: Models in the unit of resume.
        recipe: How models are trained.
        ks: Compressed sizes.
        dense_ks: Compressed sizes of the dense projections, which cost the most.
        sjlt_masks: Coordinates that a mask keeps before an SJLT.
        normal_masks: Coordinates that a mask keeps before a dense projection.
        masks: One of `MASKS`.
        batch_size: Windows whose gradients are computed at once.
        buffer_bytes: Gradient rows collected before they are projected; None for the attributor's own.
    """

    scale: str
    sizes: MusicSizes
    n_train: int
    n_query: int
    n_lds: int
    n_trak: int
    second_seed_share: float
    group_size: int
    recipe: MusicRecipe
    ks: tuple[int, ...]
    dense_ks: tuple[int, ...]
    sjlt_masks: tuple[int, ...]
    normal_masks: tuple[int, ...]
    masks: str
    batch_size: int
    buffer_bytes: int | None

    def specs(self) -> tuple[str, ...]:
        """The compressions to compare: the published rows, and ``rademacher``, which those called fjlt were.

        Returns:
            Lone masks, lone projections, then masks before projections; those with a fitted mask only where there are.
        """
        kinds = ("random_mask", "selective_mask") if self.masks else ("random_mask",)
        found = [f"{kind}-{k}" for kind in kinds for k in self.ks]
        found += [f"{family}-{k}" for family in ("sjlt", "fjlt") for k in self.ks]
        found += [f"rademacher-{k}" for k in self.dense_ks]
        for projection, kept, ks in (("sjlt", self.sjlt_masks, self.ks), ("normal", self.normal_masks, self.dense_ks)):
            found += [f"{kind}-{size}->{projection}-{k}" for size in kept for kind in kinds for k in ks]
        return tuple(found)

    def damping_grid(self, convention: str) -> tuple[float, ...]:
        """The damping values to choose from.

        Args:
            convention: ``relative`` or ``paper``; see `TRAK`.

        Raises:
            UsageError: There is no such convention.
        """
        if convention not in CONVENTIONS:
            raise UsageError(f"convention is {convention!r}; expected one of {', '.join(CONVENTIONS)}")
        return DAMPINGS

    def compressions(self, specs: str = "") -> list[CompressionSpec]:
        """The compressions to compare, checked against the model, so that a wrong one fails before any training.

        Args:
            specs: Specs with commas between them; empty for the scale's own.

        Raises:
            SpecError: A spec cannot be parsed, is layer-wise, needs more coordinates than the model has, or a mask
                that is not fitted.
        """
        parsed, size = parse_specs(specs or self.specs()), parameter_count(self.sizes)
        for spec in parsed:
            if spec.is_factored:
                raise SpecError(
                    f"{spec} is for layers, and this experiment compresses whole gradients; use a flat spec"
                )
            second_mask = spec.projection.needs_mask_file and not spec.sparsification.is_identity
            if second_mask or (spec.needs_mask_file and not self.masks):
                raise SpecError(
                    f"{spec} needs a fitted mask that this run has none of; expected masks=energy, and a "
                    "selective type first, such as selective_mask-K or selective_mask-K->TYPE-DIM"
                )
            first = spec.projection if spec.sparsification.is_identity else spec.sparsification
            first.check_input(size)
        return parsed


def protocol(scale: str, *, n_lds: int = 0, n_trak: int = 0, masks: str = "energy") -> Protocol:
    """The protocol of a scale.

    Args:
        scale: ``embedded`` (a CPU, two minutes, chorales and a tiny model) or ``paper`` (MAESTRO, the paper's sizes).
        n_lds: Another number of LDS models; 0 for the scale's own.
        n_trak: Another number of TRAK models; 0 for the scale's own.
        masks: One of `MASKS`.

    Raises:
        UsageError: There is no such scale or way to choose masks, or a number is negative or too small.
    """
    check_scale(scale)
    check_models(n_lds, n_trak)
    if masks not in MASKS:
        raise UsageError(f"masks is {masks!r}; expected energy, or nothing to leave selective types out")
    if scale == "embedded":
        chosen = Protocol(
            scale=scale,
            sizes=MusicSizes(layers=2, width=32, heads=2, feedforward=64, length=64),
            n_train=512,
            n_query=100,
            n_lds=16,
            n_trak=3,
            second_seed_share=0.5,
            group_size=5,
            recipe=MusicRecipe(lr=3e-3, epochs=12, batch_size=32),
            ks=(128, 512),
            dense_ks=(128,),
            sjlt_masks=(4096,),
            normal_masks=(4096,),
            masks=masks,
            batch_size=64,
            buffer_bytes=None,
        )
    else:
        chosen = Protocol(
            scale=scale,
            sizes=MusicSizes(),
            n_train=maestro.N_TRAIN,
            n_query=maestro.N_QUERY,
            n_lds=50,
            n_trak=5,
            second_seed_share=0.5,
            group_size=5,
            recipe=MusicRecipe(),
            ks=(2048, 4096, 8192),
            dense_ks=(2048, 4096, 8192),
            sjlt_masks=(32_768, 131_072, 524_288),
            normal_masks=(32_768, 131_072),
            masks=masks,
            batch_size=64,
            # A dense projection of 13 million numbers costs most in drawing its matrix, once for every buffer.
            buffer_bytes=12 * 2**30,
        )
    return replace(chosen, n_lds=n_lds or chosen.n_lds, n_trak=n_trak or chosen.n_trak)


def check_scale(scale: str) -> None:
    """Raises UsageError for a scale that there is not."""
    if scale not in ("embedded", "paper"):
        raise UsageError(f"scale is {scale!r}; expected one of embedded, paper")
