"""The protocol of ResNet-9 + CIFAR-2 at both scales: sizes, recipes, compressions, grids of damping."""

from __future__ import annotations

from dataclasses import dataclass, replace

from grass_lib.errors import SpecError, UsageError
from grass_lib.experiments.banks import check_models
from grass_lib.experiments.data.cifar2 import SIZES, check_choice
from grass_lib.experiments.mlp_mnist import PAPER_DAMPINGS, RELATIVE_DAMPINGS
from grass_lib.experiments.mlp_trainer import Target
from grass_lib.experiments.models.resnet9 import ResNet9Sizes
from grass_lib.experiments.resnet9_trainer import ImageRecipe
from grass_lib.specs import CompressionSpec, parse_specs

RECIPES = {
    "embedded": {
        "one_cycle": ImageRecipe(lr=0.05, epochs=15, batch_size=16, warm_up=0.3),
        "paper": ImageRecipe(lr=0.01, epochs=10, batch_size=16),
    },
    "paper": {
        "one_cycle": ImageRecipe(lr=0.05, epochs=24, warm_up=0.3),
        "paper": ImageRecipe(lr=0.01, epochs=10),
    },
}
"""How networks are trained, by scale and name: ``paper`` as documented, ``one_cycle`` longer and with another rate."""
MASKS = ("", "energy", "learned")
"""How the masks of selective compressions are fitted; "" for none."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, grids and recipe of one scale.

    Attributes:
        scale: ``embedded`` or ``paper``.
        n_train: Training images.
        n_query: Query images; a tenth of them chooses the damping.
        n_lds: Models that LDS is measured on.
        n_trak: Models that TRAK uses.
        second_seed_share: Share of the LDS subsets trained with a second seed.
        group_size: Models between two states that a killed run goes on from.
        sizes: Of the model.
        recipe: How models are trained.
        ks: Compressed sizes.
        dense_ks: Compressed sizes of the dense projection of whole gradients, which costs the most.
        mask_sizes: Coordinates kept before a second projection.
        micro_batch: Samples whose gradients are computed at once.
        fit_rows: Training images that masks are fitted to.
        masks: One of `MASKS`.
        dampings: Grid of relative damping.
        paper_dampings: Grid of absolute damping, for ``convention="paper"``.
        target: Ground truth: ``loss`` is the negated cross-entropy as in the reference, ``margin`` the margin.
    """

    scale: str
    n_train: int
    n_query: int
    n_lds: int
    n_trak: int
    second_seed_share: float
    group_size: int
    sizes: ResNet9Sizes
    recipe: ImageRecipe
    ks: tuple[int, ...]
    dense_ks: tuple[int, ...]
    mask_sizes: tuple[int, ...]
    micro_batch: int
    fit_rows: int
    masks: str = ""
    dampings: tuple[float, ...] = RELATIVE_DAMPINGS
    paper_dampings: tuple[float, ...] = PAPER_DAMPINGS
    target: Target = "loss"

    def specs(self) -> tuple[str, ...]:
        """The compressions to compare: those of the published rows, selective ones only with masks."""
        first = ("random_mask", "selective_mask") if self.masks else ("random_mask",)
        return (
            *(f"{name}-{k}" for name in first for k in self.ks),
            *(f"{name}-{k}" for name in ("sjlt", "fjlt") for k in self.ks),
            *(f"rademacher-{k}" for k in self.dense_ks),
            *(
                f"{name}-{size}->{second}-{k}"
                for name in first
                for size in self.mask_sizes
                for second in ("sjlt", "normal")
                for k in self.ks
            ),
        )

    def damping_grid(self, convention: str) -> tuple[float, ...]:
        """The damping values to choose from.

        Args:
            convention: ``relative`` or ``paper``; see `TRAK`.

        Raises:
            UsageError: There is no such convention.
        """
        grids = {"relative": self.dampings, "paper": self.paper_dampings}
        if convention not in grids:
            raise UsageError(f"convention is {convention!r}; expected one of {', '.join(grids)}")
        return grids[convention]

    def compressions(self, specs: str = "") -> list[CompressionSpec]:
        """The compressions to compare, checked against the model, so that a wrong one fails before any training.

        Args:
            specs: Specs with commas between them; empty for the scale's own.

        Raises:
            SpecError: A spec cannot be parsed, is layer-wise, or needs more coordinates than the model has.
            UsageError: A spec is selective, and no masks are to be fitted, or none for its second stage.
        """
        parsed = parse_specs(specs or self.specs())
        for spec in parsed:
            if spec.is_factored:
                raise SpecError(
                    f"{spec} is for layers, and this experiment compresses whole gradients; use a flat spec"
                )
            first = spec.projection if spec.sparsification.is_identity else spec.sparsification
            first.check_input(self.sizes.parameters)
            if spec.projection.needs_mask_file and not spec.sparsification.is_identity:
                raise SpecError(
                    f"{spec} has a selective type second, and masks are fitted to whole gradients; expected it first, "
                    "such as selective_mask-K or selective_mask-K->TYPE-DIM"
                )
            if spec.needs_mask_file and not self.masks:
                raise UsageError(f"{spec} needs a fitted mask, and masks is ''; expected masks=energy or masks=learned")
        return parsed


def protocol(
    scale: str,
    *,
    recipe: str = "one_cycle",
    masks: str = "",
    n_lds: int = 0,
    n_trak: int = 0,
    target: Target = "loss",
) -> Protocol:
    """The protocol of a scale.

    Args:
        scale: ``embedded`` (a CPU, two minutes, a narrow network) or ``paper`` (section 7.2's sizes).
        recipe: ``one_cycle`` or ``paper``; see `RECIPES`.
        masks: One of `MASKS`.
        n_lds: Another number of LDS models; 0 for the scale's own.
        n_trak: Another number of TRAK models; 0 for the scale's own.
        target: Ground truth.

    Raises:
        UsageError: There is no such scale, recipe, mask or target, or a number is out of range.
    """
    check_choice(scale)
    if recipe not in RECIPES[scale]:
        raise UsageError(f"recipe is {recipe!r}; expected one of {', '.join(RECIPES[scale])}")
    if masks not in MASKS:
        raise UsageError(f"masks is {masks!r}; expected one of {', '.join(map(repr, MASKS))}")
    check_models(n_lds, n_trak)
    if target not in ("loss", "margin"):
        raise UsageError(f"target is {target!r}; expected loss or margin")
    n_train, n_query = SIZES[scale]
    small = scale == "embedded"
    chosen = Protocol(
        scale=scale,
        n_train=n_train,
        n_query=n_query,
        n_lds=20 if small else 50,
        n_trak=5 if small else 10,
        second_seed_share=0.5,
        group_size=5,
        sizes=ResNet9Sizes(width=8, stem_stride=2) if small else ResNet9Sizes(),
        recipe=RECIPES[scale][recipe],
        ks=(64, 128, 256) if small else (2048, 4096, 8192),
        dense_ks=(64,) if small else (2048, 4096, 8192),
        mask_sizes=(1024, 4096) if small else (32768, 131072),
        micro_batch=50 if small else 64,
        fit_rows=n_train if small else 1000,
        masks=masks,
        target=target,
    )
    return replace(chosen, n_lds=n_lds or chosen.n_lds, n_trak=n_trak or chosen.n_trak)
