"""Turns what notebooks compute into plain JSON values."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grass_lib.errors import UsageError


def plain(value: Any, name: str) -> Any:
    """Values of numpy, torch and pathlib as plain JSON values."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"{name} is {value}, expected a finite number; leave it out where it is not defined")
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, name) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), name)
    if isinstance(value, Path):
        return str(value)
    raise UsageError(
        f"{name} is a {type(value).__name__}, expected numbers, text, lists or dictionaries that JSON can hold"
    )


def fields_of(value: Any, names: tuple[str, ...]) -> Any:
    """An object with such attributes as a dictionary; dictionaries and None pass."""
    if value is None or isinstance(value, Mapping):
        return value
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def seconds_fields(seconds: float | Sequence[float] | None) -> dict[str, Any]:
    """Seconds in all and, for a list, their 95 % interval by bootstrap.

    Repetitions count with their median, so that what happens once, the compilation of a kernel, does not.

    Args:
        seconds: seconds in all, or of each repetition.

    Returns:
        ``projection_seconds`` and, for two repetitions or more, ``projection_seconds_interval``.
    """
    if seconds is None or isinstance(seconds, int | float):
        return {"projection_seconds": seconds}
    parts = [float(part) for part in seconds]
    total: dict[str, Any] = {"projection_seconds": len(parts) * statistics.median(parts)}
    if len(parts) < 2:
        return total
    generator = random.Random(0)
    sums = sorted(len(parts) * statistics.median(generator.choices(parts, k=len(parts))) for _ in range(1000))
    return {**total, "projection_seconds_interval": [sums[25], sums[974]]}


def stages_of(spec: Any, sparsification: Any = "identity", projection: Any = "identity") -> Any:
    """The `CompressionSpec` of a result row.

    Args:
        spec: one, or its string; None takes the two stages.
        sparsification: stage 1.
        projection: stage 2.

    Raises:
        SpecError: it cannot be parsed.
    """
    from grass_lib.specs import CompressionSpec

    if spec is None:
        return CompressionSpec.parse(sparsification=str(sparsification), projection=str(projection))
    return spec if isinstance(spec, CompressionSpec) else CompressionSpec.parse(str(spec))
