"""What `grass bench projections` measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAIN_SHAPES = (
    (64, 4_800_000, 4096),
    (512, 109_386, 1024),
    (512, 109_386, 4096),
    (64, 13_300_000, 2048),
    (256, 16_384, 4096),
)
SWEEP_K = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SWEEP_SHAPE = (64, 1_000_000)
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BACKENDS = {
    "sjlt": ("kernel", "torch", "sjlt"),
    "sjlt_4": ("kernel", "sjlt"),
    "blocksjlt": ("kernel",),
    "fjlt": ("kernel", "torch"),
    "rademacher": ("kernel", "torch", "fast_jl"),
    "normal": ("kernel", "torch"),
    "random_mask": ("kernel", "torch"),
    "grass": ("kernel", "torch"),
}
_SWEEP_TYPES = ("sjlt", "blocksjlt", "fjlt", "rademacher")
CPU_SHAPES = ((64, 109_386, 1024), (64, 109_386, 4096), (256, 16_384, 4096))
CPU_TYPES = ("sjlt", "sjlt_4", "blocksjlt", "fjlt", "random_mask", "grass")


@dataclass(frozen=True)
class Case:
    """One line of the table: one operator, one backend, one input.

    Attributes:
        part: ``"shapes"``, ``"k"``, ``"density"`` or ``"dtype"``.
        spec: Of the operator.
        backend: Whose code.
        batch: Rows.
        p: Input dimension.
        k: Output dimension.
        dtype: Name of the input's and output's type.
        density: Share of the input that is not zero.
    """

    part: str
    spec: str
    backend: str
    batch: int
    p: int
    k: int
    dtype: str = "float32"
    density: float = 1.0


def _cases(part: str, types: tuple[str, ...], batch: int, p: int, k: int, skip: tuple[str, ...] = ()) -> Iterator[Case]:
    for family in types:
        if (family == "grass" and 4 * k > p) or (family == "fast_jl" and k % 512):
            continue
        for backend in BACKENDS[family]:
            if backend not in skip and not (backend == "fast_jl" and k % 512):
                yield Case(part, f"{family}-{k}", backend, batch, p, k)


def gpu_cases() -> list[Case]:
    """All cases of a GPU, those of one input next to each other."""
    cases: list[Case] = []
    for batch, p, k in MAIN_SHAPES:
        cases += _cases("shapes", tuple(BACKENDS), batch, p, k)
    batch, p, k = MAIN_SHAPES[0]
    for dtype in ("float16", "bfloat16"):
        cases += [Case("dtype", f"sjlt-{k}", backend, batch, p, k, dtype) for backend in BACKENDS["sjlt"]]
        cases += [Case("dtype", f"{t}-{k}", "kernel", batch, p, k, dtype) for t in ("fjlt", "rademacher")]
    for density in DENSITIES:
        cases += [Case("density", f"sjlt-{k}", b, batch, p, k, density=density) for b in ("kernel", "sjlt")]
    for k in SWEEP_K:
        cases += _cases("k", _SWEEP_TYPES, *SWEEP_SHAPE, k, skip=("torch",))
    return cases


def cpu_cases() -> list[Case]:
    """All cases of a CPU: the library's own paths."""
    return [
        Case("shapes", f"{family}-{k}", "torch", batch, p, k)
        for batch, p, k in CPU_SHAPES
        for family in CPU_TYPES
        if not (family == "grass" and 4 * k > p)
    ]
