"""What is compared: the same compressed sizes and the same damping grid for every system."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grass_lib.attribution.presets import factgrass_spec, logra_spec
from grass_lib.baselines.systems import (
    BergsonOptions,
    DattriOptions,
    KronfluenceOptions,
    LogIXOptions,
    Options,
    OursOptions,
)
from grass_lib.errors import UsageError
from grass_lib.specs import CompressionSpec, parse_specs

INITS = ("random", "pca")
"""LogIX's ways to begin, both of which the paper has."""
RELATIVE_DEFAULT = 0.1
"""The relative damping that LogIX, bergson and kronfluence have as a default or an option."""


def damping_values(text: str, default: Sequence[float]) -> tuple[float, ...]:
    """A damping grid as it is typed.

    Args:
        text: Numbers with commas between them; empty for the default.
        default: The grid where none is typed.

    Raises:
        UsageError: One is no number above 0.
    """
    if not text.strip():
        return tuple(default)
    try:
        found = tuple(float(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or any(not 0.0 < value < math.inf for value in found):
        raise UsageError(f"dampings is {text!r}; expected numbers above 0 with commas between them, such as 0.01,0.1,1")
    return tuple(sorted(set(found)))


def sides(ks: Sequence[int]) -> list[int]:
    """Square roots of compressed sizes.

    Raises:
        UsageError: One is not a square.
    """
    found = []
    for k in ks:
        side = math.isqrt(max(k, 0))
        if k < 1 or side * side != k:
            raise UsageError(f"k is {k}; expected squares, such as 256 = 16 * 16, since both sides get the same size")
        found.append(side)
    return found


def our_specs(ks: Sequence[int], specs: str = "") -> list[CompressionSpec]:
    """Our compressions: LoGra and FactGraSS at each size, or the ones that are typed.

    Args:
        ks: Compressed sizes of a layer.
        specs: With commas between them; empty for the default.

    Raises:
        SpecError: One cannot be parsed.
    """
    if specs:
        return parse_specs(specs)
    return [build(k) for k in ks for build in (logra_spec, factgrass_spec)]


def comparison(
    ks: Sequence[int], dampings: Sequence[float], *, specs: str = "", all_modes: bool = False, device: str = "cpu"
) -> dict[str, list[Options]]:
    """The options that are compared, by system.

    LogIX has both of the paper's initialisations at every size with its Hessian ``raw``, and at the largest size the
    Hessians ``ekfac`` and ``none`` too. The others but ours have the largest size alone.

    Args:
        ks: Compressed sizes of a layer, squares.
        dampings: The relative grid.
        specs: Our compressions, if not LoGra and FactGraSS at each size.
        all_modes: Gives LogIX each of its initialisations with each of these Hessians at every size.
        device: Where it will run. On a GPU dattri keeps gradients on the disk, which it cannot do on a CPU, and ours
            compiles its pass.

    Raises:
        UsageError: A size is not a square.
        SpecError: A spec cannot be parsed.
    """
    grid, ranks = tuple(dampings), sides(ks)
    last = ranks[-1]
    offload = "disk" if device.startswith("cuda") else "cpu"
    modes = [("raw", init, rank) for rank in ranks for init in INITS]
    modes += [("ekfac", init, rank) for rank in (ranks if all_modes else ranks[-1:]) for init in INITS]
    modes += [("none", init, rank) for rank in ranks for init in INITS] if all_modes else [("none", "random", last)]
    logix: list[Options] = [
        LogIXOptions(rank=rank, init=init, hessian=hessian, dampings=() if hessian == "none" else grid)
        for hessian, init, rank in modes
    ]
    return {
        "grass_lib": [
            OursOptions(spec=str(spec), dampings=grid, compile=device.startswith("cuda"))
            for spec in our_specs(ks, specs)
        ],
        "logix": logix,
        "dattri": [
            DattriOptions(method=method, k=ks[-1], dampings=grid, offload=offload) for method in ("logra", "factgrass")
        ],
        "bergson": [BergsonOptions(side=last, dampings=grid)],
        "kronfluence": [KronfluenceOptions(dampings=(RELATIVE_DEFAULT,))],
    }
