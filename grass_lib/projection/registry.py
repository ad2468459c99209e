"""From a spec to a projector."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from grass_lib.errors import SpecError, UsageError
from grass_lib.projection.base import Composition, Identity, Projector
from grass_lib.projection.dense import Dense
from grass_lib.projection.fast_jl import FastJL
from grass_lib.projection.fjlt import FJLT
from grass_lib.projection.mask import MaskProjector
from grass_lib.projection.mask_file import Mask
from grass_lib.projection.sjlt import SJLT, PackageSJLT
from grass_lib.rng import Stream
from grass_lib.specs import CompressionSpec, StageSpec

BACKENDS = ("auto", "torch", "sjlt", "fast_jl")
SPARSIFICATION = "sparsification"
PROJECTION = "projection"
_BACKEND_FAMILY = {"sjlt": ("sjlt", "grass", "selective_grass"), "fast_jl": ("rademacher",)}
# Families that cannot give more numbers than they take.
_SHRINKING = ("fjlt", "random_mask", "selective_mask", "grass", "selective_grass")


@dataclass(frozen=True)
class _Request:
    """Everything that a builder needs beside the stage."""

    p: int
    seed: int
    name: str
    checkpoint: int
    device: torch.device
    dtype: torch.dtype
    backend: str
    mask: Mask | None

    def stream(self, stage: str) -> Stream:
        return Stream(self.seed, self.name, stage, self.checkpoint)

    def common(self) -> dict[str, object]:
        return {"device": self.device, "dtype": self.dtype}


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

    The same ``(spec, p, seed, name, checkpoint)`` gives the same numbers on every device, in any batch size. The first
    stage draws from the stream ``"sparsification"``, the second from ``"projection"``; a mask that stands alone counts
    as the first stage, anything else that stands alone as the second. So ``grass_N-K`` is exactly
    ``random_mask-(N*K)`` followed by ``sjlt-K``.

    Args:
        spec: For example ``"sjlt-4096"`` or a parsed spec with one or two flat stages.
        p: Input dimension.
        seed: Of the random numbers.
        name: Of the vectors, for example a layer's name: other names give independent projections.
        device: Where to project.
        dtype: Of the outputs; float64 accumulates in float64, everything else in float32.
        backend: ``"torch"``, or one of the optional packages ``"sjlt"`` (for sjlt and grass) and ``"fast_jl"`` (for
            rademacher), which need a GPU; ``"auto"`` means ``"torch"``.
        checkpoint: Number of the checkpoint in an ensemble.
        mask: For selective types, the mask or its file.

    Returns:
        A projector with ``.p``, ``.k``, ``.spec``, ``.backend``.

    Raises:
        SpecError: If the spec cannot be parsed or does not fit p.
        UsageError: If another argument is wrong or a package is missing.
    """
    if isinstance(p, bool) or not isinstance(p, int) or p < 1:
        raise UsageError(f"p is {p!r}; expected the length of the vectors, at least 1.")
    if backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}.")
    parsed = spec if isinstance(spec, StageSpec) else CompressionSpec.parse(spec)
    first, second = _stages(parsed)
    _check_backend(backend, parsed, (first, second))
    loaded = _load_mask(mask, parsed, (first, second))
    place = _resolve(device)

    def build(stage: StageSpec, size: int, stream: str) -> Projector:
        request = _Request(size, seed, name, checkpoint, place, dtype, backend, loaded)
        _check_size(stage, size)
        return _BUILDERS[stage.family](stage, request, stream)

    if first.is_identity:
        return build(second, p, SPARSIFICATION if second.is_mask else PROJECTION)
    inner = build(first, p, SPARSIFICATION)
    if second.is_identity:
        return inner
    return Composition(parsed, inner, build(second, inner.k, PROJECTION))


def _stages(spec: StageSpec | CompressionSpec) -> tuple[StageSpec, StageSpec]:
    pair = (StageSpec("identity"), spec) if isinstance(spec, StageSpec) else (spec.sparsification, spec.projection)
    for stage in pair:
        if stage.is_factored:
            raise SpecError(
                f"{stage} has one dimension per side of a layer and cannot project flat vectors; "
                f"nearest valid form: {stage.family}-{stage.k}."
            )
    return pair


def _check_size(stage: StageSpec, p: int) -> None:
    if stage.family not in _SHRINKING:
        return
    needed = stage.mask_size or stage.k or 0
    if needed > p:
        what = f"keeps {needed} coordinates" if stage.mask_size else f"gives {needed} numbers"
        fitting = p // (stage.param or 1) if stage.param else p
        nearest = f"{str(stage).rsplit('-', 1)[0]}-{fitting}" if fitting else "sjlt-" + str(stage.k)
        raise SpecError(f"{stage} {what}, but the vectors have {p}; nearest valid form: {nearest}.")


def _check_backend(backend: str, spec: StageSpec | CompressionSpec, stages: tuple[StageSpec, StageSpec]) -> None:
    families = _BACKEND_FAMILY.get(backend)
    if families and not any(stage.family in families for stage in stages):
        raise UsageError(f"backend={backend!r} serves {', '.join(families)}; {spec} has none. Use backend='torch'.")


def _load_mask(
    mask: Mask | str | Path | None, spec: StageSpec | CompressionSpec, stages: tuple[StageSpec, StageSpec]
) -> Mask | None:
    wanted = [stage for stage in stages if stage.needs_mask_file]
    if not wanted:
        if mask is not None:
            raise UsageError(f"A mask was given, but {spec} has no selective stage; leave mask out.")
        return None
    if mask is None:
        raise UsageError(f"{spec} needs the coordinates to keep; give mask= a Mask or the path of a mask file.")
    if len(wanted) == 2:
        raise UsageError(f"{spec} has two selective stages, but one mask is given; use a selective stage once.")
    return mask if isinstance(mask, Mask) else Mask.load(mask)


def _resolve(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device is {device!r}; expected for example 'cpu' or 'cuda'.") from error
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise UsageError(f"device is {device!r}, but torch sees no GPU; expected 'cpu' here.")
    # Tensors always carry a number, so "cuda" and "cuda:0" must not count as different places.
    return place if place.index is not None else torch.device("cuda", torch.cuda.current_device())


def _identity(stage: StageSpec, request: _Request, stream: str) -> Projector:
    return Identity(stage, request.p, request.p, device=request.device, dtype=request.dtype)


def _dense(stage: StageSpec, request: _Request, stream: str) -> Projector:
    k = stage.dims[0]
    if request.backend == "fast_jl" and stage.family == "rademacher":
        return FastJL(stage, request.p, k, stream=request.stream(stream), **request.common())
    signs = stage.family == "rademacher"
    return Dense(stage, request.p, k, stream=request.stream(stream), signs=signs, **request.common())


def _sjlt(stage: StageSpec, request: _Request, stream: str) -> Projector:
    package = request.backend == "sjlt"
    return (PackageSJLT if package else SJLT)(
        stage,
        request.p,
        stage.dims[0],
        stream=request.stream(stream),
        nonzeros=stage.param or 1,
        backend="sjlt" if package else "torch",
        **request.common(),
    )


def _fjlt(stage: StageSpec, request: _Request, stream: str) -> Projector:
    k = stage.dims[0]
    # The reference gives this name to a dense sign matrix without the factor 1 / sqrt(k).
    return FJLT(stage, request.p, k, stream=request.stream(stream), paper_scale=math.sqrt(k), **request.common())


def _random_mask(stage: StageSpec, request: _Request, stream: str) -> Projector:
    k = stage.dims[0]
    indices = request.stream(stream).distinct(k, request.p, device=request.device)
    scale = math.sqrt(request.p / k)
    return MaskProjector(stage, request.p, indices, scale=scale, paper_scale=1.0 / scale, **request.common())


def _selective_mask(stage: StageSpec, request: _Request, stream: str) -> Projector:
    mask, size = request.mask, stage.mask_size
    if mask is None:
        raise UsageError(f"{stage} needs the coordinates to keep; give mask= a Mask or the path of a mask file.")
    if mask.k != size:
        raise UsageError(f"{stage} keeps {size} coordinates; the mask has {mask.k}. Use a mask fitted for {size}.")
    if mask.p != request.p:
        raise UsageError(
            f"The mask was made for vectors of length {mask.p}; these have {request.p}. Use a mask fitted on this model."
        )
    return MaskProjector(stage, request.p, mask.indices, scale=1.0, **request.common())


def _grass(stage: StageSpec, request: _Request, stream: str) -> Projector:
    random = stage.family == "grass"
    size = stage.mask_size or 0
    kept = StageSpec("random_mask" if random else "selective_mask", (size,))
    first = (_random_mask if random else _selective_mask)(kept, request, SPARSIFICATION)
    inner = _Request(size, request.seed, request.name, request.checkpoint, request.device, request.dtype,
                     request.backend, None)  # fmt: skip
    return Composition(stage, first, _sjlt(StageSpec("sjlt", stage.dims), inner, PROJECTION))


_BUILDERS: dict[str, Callable[[StageSpec, _Request, str], Projector]] = {
    "normal": _dense,
    "rademacher": _dense,
    "sjlt": _sjlt,
    "fjlt": _fjlt,
    "random_mask": _random_mask,
    "selective_mask": _selective_mask,
    "grass": _grass,
    "selective_grass": _grass,
    "identity": _identity,
}
