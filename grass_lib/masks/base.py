"""The one call that makes a flat mask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.masks.energy import fit_energy
from grass_lib.masks.learned import learn
from grass_lib.masks.leverage import fit_leverage
from grass_lib.masks.source import GradientSource, as_source, check_request
from grass_lib.masks.uniform import fit_random
from grass_lib.projection import Mask

METHODS = ("random", "energy", "leverage", "learned")
"""Ways to choose coordinates, from the cheapest to the dearest."""
_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "random": (),
    "energy": (),
    "leverage": ("sketch", "ridge"),
    "learned": ("recipe", "cache_bytes", "cache_folder"),
}


def fit(
    gradients: GradientSource | Tensor,
    k: int,
    *,
    method: str = "learned",
    queries: GradientSource | Tensor | None = None,
    seed: int = 0,
    name: str = "",
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
    **options: Any,
) -> Mask:
    """Chooses the k coordinates to keep.

    ``random``: those of the projector random_mask-k with the same seed and name. ``energy``: the largest second
    moments. ``leverage``: the largest ridge leverage scores; options ``sketch``, ``ridge``. ``learned``: Selective Mask
    (section 3.1 of the paper); options ``recipe`` (a `LearnedRecipe`, or "paper"), ``cache_bytes``, ``cache_folder``.

    Args:
        gradients: Per-sample gradients of the training samples, ``(n, p)``; a source or a matrix.
        k: Number of coordinates, at most p.
        method: One of `METHODS`.
        queries: Gradients of queries for ``learned``, which else takes some of the rows; the other methods need none.
        seed: Of every random choice.
        name: Of every random choice, as in `build_projector`.
        provenance: Entries for the mask, such as hashes of model and data.
        progress: Shows a bar for a training that lasts more than 3 s.
        **options: Of the method.

    Returns:
        The mask on the CPU. Its scores are second moments, leverage scores or the learned S; a random one has none. Its
        provenance has ``method``, ``seed``, ``name``, ``n``, ``options``, and for ``learned`` ``steps``,
        ``held_out_correlation`` and ``energy_correlation`` (of the energy mask, on the same pairs).

    Raises:
        UsageError: An argument is out of range, or the gradients are not finite, all zero or too few.
    """
    if method not in METHODS:
        raise UsageError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    unknown = sorted(set(options) - set(_OPTIONS[method]))
    if unknown:
        known = ", ".join(_OPTIONS[method]) or "none"
        raise UsageError(f"method {method!r} has no option {', '.join(unknown)}; its options: {known}")
    source, asked = as_source(gradients), None if queries is None else as_source(queries)
    check_request(source, k, asked)
    scores: Tensor | None = None
    facts: Mapping[str, str] = {}
    if method == "random":
        indices = fit_random(source.p, k, seed=seed, name=name)
    elif method == "energy":
        indices, scores = fit_energy(source, k)
    elif method == "leverage":
        indices, scores = fit_leverage(source, k, seed=seed, name=name, **options)
    else:
        found = learn(source, k, queries=asked, seed=seed, name=name, progress=progress, **options)
        indices, scores, facts = found.indices, found.scores, found.facts
    shown = json.dumps({key: str(value) for key, value in options.items()}, sort_keys=True)
    own = {"method": method, "seed": str(seed), "name": name, "n": str(source.n), "options": shown, **facts}
    clash = sorted(set(provenance or {}) & set(own))
    if clash:
        raise UsageError(f"provenance has {', '.join(clash)}, which the mask writes itself; use other names")
    return Mask(indices.cpu(), source.p, None if scores is None else scores.cpu(), {**(provenance or {}), **own})
