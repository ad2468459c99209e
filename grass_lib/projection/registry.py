"""From a spec to a projector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from grass_lib.devices import usable_device
from grass_lib.errors import SpecError, UsageError
from grass_lib.projection.backends import FastJLProjector, SJLTPackageProjector
from grass_lib.projection.base import Projector, Recipe
from grass_lib.projection.blocksjlt import BlockSJLTProjector
from grass_lib.projection.dense import NormalProjector, RademacherProjector
from grass_lib.projection.fjlt import FJLTProjector
from grass_lib.projection.grass import ComposedProjector
from grass_lib.projection.identity import IdentityProjector
from grass_lib.projection.mask import MaskProjector
from grass_lib.projection.mask_file import Mask
from grass_lib.projection.sjlt import SJLTProjector
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec, StageSpec

BACKENDS = ("auto", "torch", "kernel", "sjlt", "fast_jl")
"""What ``backend=`` takes; "auto" is "kernel" for each stage that a GPU kernel can serve here, else "torch"."""


def build_projector(
    spec: str | StageSpec | CompressionSpec,
    p: int,
    *,
    seed: int = 0,
    name: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    checkpoint: int = 0,
    mask: Mask | str | Path | None = None,
) -> Projector:
    """Builds the projector of a flat spec.

    The random stream is named by ``(seed, name, stage, checkpoint)``. A stage-1 operator and a mask that stands alone
    use the stage "sparsification", a projection uses "projection"; so grass_N-K is exactly random_mask-(N*K) and then
    sjlt-K.

    Args:
        spec: ``"sjlt-4096"``, ``"random_mask-16384->sjlt-4096"``, or such a spec already parsed.
        p: Number of input coordinates.
        seed: The run's seed.
        name: What is projected, for example a layer's name; different names have independent operators.
        device: Device of inputs and outputs.
        dtype: Output dtype; float64 also accumulates in float64, all others in float32.
        backend: "torch" and "kernel" are this library's own code: plain PyTorch anywhere, and GPU kernels with the same
            numbers to rounding. "auto" takes the kernel for each stage where it can work (a CUDA GPU, a type up to
            float32, ``cuda-bindings``, for normal ``triton``), else "torch"; the projector's ``backend`` says which.
            "sjlt" (the package, for sjlt stages) and "fast_jl" (for rademacher, with its own matrix) need a GPU and
            ``make cuda``.
        checkpoint: Index of the checkpoint in an ensemble.
        mask: For selective types: a `Mask` or the path of a mask file.

    Returns:
        The projector; its ``spec`` is the parsed argument.

    Raises:
        SpecError: The spec is invalid, factored, or does not fit ``p``.
        UsageError: Another argument is wrong, a mask is missing or does not fit, or a backend is not usable.
    """
    parsed = _parse(spec)
    if parsed.is_factored:
        raise SpecError(
            f"'{parsed}' is factored: it acts on the two sides of a layer's gradient; expected a flat spec such as "
            f"'{parsed.sparsification.family}-{parsed.sparsification.k}' here"
        )
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if parsed.needs_mask_file and mask is None:
        raise UsageError(f"'{parsed}' needs a mask; give mask=, a Mask or the path of a mask file")
    if mask is not None and not parsed.needs_mask_file:
        raise UsageError(f"'{parsed}' takes no mask, and one was given; leave mask= out, or use a selective type")
    if parsed.sparsification.needs_mask_file and parsed.projection.needs_mask_file:
        raise UsageError(f"'{parsed}' would need two masks, and one can be given; let only one stage be selective")
    first, second = Stream(seed, name, "sparsification", checkpoint), Stream(seed, name, "projection", checkpoint)
    recipe = Recipe(
        stage=parsed.projection,
        p=p,
        stream=second,
        inner=second,
        device=usable_device(device),
        dtype=dtype,
        backend=backend,
        mask=Mask.load(mask) if isinstance(mask, (str, Path)) else mask,
    )
    if parsed.sparsification.is_identity:
        # A mask that stands alone, or begins a grass stage, is a sparsification whatever its place in the string.
        masks = parsed.projection.mask_size is not None
        projector = _build(replace(recipe, stream=first if masks else second))
    else:
        projector = _pair(recipe, parsed.sparsification, first, first, parsed.projection, second)
    projector.spec = spec if isinstance(spec, StageSpec) else parsed
    if recipe.backend not in ("auto", "torch", projector.backend):
        raise UsageError(
            f"backend={backend!r} has nothing to do in '{parsed}': sjlt serves sjlt and grass stages, fast_jl serves "
            "rademacher, kernel all but identity; use backend='torch'"
        )
    return projector


def _sjlt(recipe: Recipe) -> Projector:
    return SJLTPackageProjector(recipe) if recipe.backend == "sjlt" else SJLTProjector(recipe)


def _rademacher(recipe: Recipe) -> Projector:
    return FastJLProjector(recipe) if recipe.backend == "fast_jl" else RademacherProjector(recipe)


def _grass(recipe: Recipe) -> Projector:
    kind = "selective_mask" if recipe.stage.needs_mask_file else "random_mask"
    mask = StageSpec(kind, (recipe.stage.mask_size or 0,))
    return _pair(recipe, mask, recipe.stream, recipe.inner, StageSpec("sjlt", recipe.stage.dims), recipe.inner)


_FAMILIES: Mapping[str, Callable[[Recipe], Projector]] = MappingProxyType(
    {
        "normal": NormalProjector,
        "rademacher": _rademacher,
        "sjlt": _sjlt,
        "blocksjlt": BlockSJLTProjector,
        "fjlt": FJLTProjector,
        "random_mask": MaskProjector,
        "selective_mask": MaskProjector,
        "grass": _grass,
        "selective_grass": _grass,
        "identity": IdentityProjector,
    }
)


def _build(recipe: Recipe) -> Projector:
    family = recipe.stage.family
    if recipe.backend in ("auto", "kernel") and recipe.device.type == "cuda":
        # Imported here: a CPU has no use for it, and the kernels build on this package.
        from grass_lib.kernels import projectors

        if family in projectors.KERNEL_FAMILIES:
            if recipe.backend == "kernel":
                projectors.require(recipe)
            if projectors.missing_for_recipe(recipe) is None:
                return projectors.KERNEL_FAMILIES[family](recipe)
    elif recipe.backend == "kernel":
        raise UsageError(f"backend='kernel' needs a CUDA GPU, and the device is {recipe.device}; use backend='torch'")
    return _FAMILIES[family](recipe)


def _pair(
    recipe: Recipe, first: StageSpec, stream: Stream, inner: Stream, second: StageSpec, second_stream: Stream
) -> Projector:
    # The intermediate vector stays in the accumulate dtype: half types round once, at the end.
    between = torch.float64 if recipe.dtype == torch.float64 else torch.float32
    left = _build(replace(recipe, stage=first, stream=stream, inner=inner, dtype=between))
    right = _build(replace(recipe, stage=second, p=left.k, stream=second_stream, inner=second_stream))
    if recipe.device.type == "cuda":
        from grass_lib.kernels import projectors

        fused = projectors.fuse(recipe, left, right)
        if fused is not None:
            return fused
    return ComposedProjector(recipe, left, right)


def _parse(spec: str | StageSpec | CompressionSpec) -> CompressionSpec:
    if isinstance(spec, CompressionSpec):
        return spec
    if isinstance(spec, StageSpec):
        return CompressionSpec(StageSpec("identity"), spec)
    return CompressionSpec.parse(spec)
