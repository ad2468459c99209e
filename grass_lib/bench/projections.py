"""`grass bench projections`: every backend on the same inputs in one run, checked against float64."""

from __future__ import annotations

import datetime
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grass_lib.bench.cases import Case, cpu_cases, gpu_cases
from grass_lib.bench.goals import goals
from grass_lib.bench.packages import PACKAGES, package_call
from grass_lib.bench.results import goal_line, versions
from grass_lib.bench.timing import measure, read_speed
from grass_lib.errors import GrassError, UsageError
from grass_lib.experiments.base import resolve_device
from grass_lib.projection import build_projector

logger = logging.getLogger(__name__)

SCHEMA = 1
_CHECKED_ROWS = 2
_ROTATION_BYTES = 512 << 20  # of inputs in turn, several times any present L2 cache
_SLOWEST_MS = 150.0  # one call above this is noted and not repeated
_GRASS_KEPT = 32_768
_GRASS_BATCH = 8


@dataclass(frozen=True)
class Line:
    """A measured case; times in ms, speeds in bytes/s, None where it was not measured (``note`` says why)."""

    case: Case
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    repeats: int = 0
    read_bytes_per_second: float | None = None
    roofline_fraction: float | None = None
    relative_error: float | None = None
    norm_ratio: float | None = None
    note: str = ""


def run(device: str = "auto", *, repeats: int = 20, only: str = "") -> dict[str, Any]:
    """Measures all cases of a device.

    Args:
        device: ``"cuda"``, ``"cpu"`` or ``"auto"``.
        repeats: Timed calls a case, at least 20.
        only: Restricts to one part (``shapes``, ``dtype``, ``density``, ``k``); empty measures all.

    Returns:
        What `write` stores: device, versions, roofline, lines, the grass sweep and goals.

    Raises:
        UsageError: Fewer than 20 repeats, or no case is left.
    """
    if repeats < 20:
        raise UsageError(f"repeats is {repeats}; a median of at least 20 is reported")
    place = torch.device(resolve_device(device))
    gpu = place.type == "cuda"
    cases = [case for case in (gpu_cases() if gpu else cpu_cases()) if only in ("", case.part)]
    if not cases:
        raise UsageError(f"there is no part {only!r}; expected shapes, dtype, density or k")
    speed = read_speed(place) if gpu else None
    lines: list[Line] = []
    try:
        for line in _lines(cases, place, repeats, speed):
            lines.append(line)  # one by one: an interrupted run keeps them
    except KeyboardInterrupt:
        logger.warning("stopped after %d of %d cases; what was measured is kept", len(lines), len(cases))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "grass bench projections",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(place) if gpu else platform.machine(),
        "device_type": place.type,
        "cases": len(cases),
        "versions": versions("triton", "cuda-bindings", "sjlt", "fast_jl"),
        "read_bytes_per_second": speed,
        "lines": [asdict(line) for line in lines],
        "grass_sweep": _grass_sweep(place, repeats) if gpu and only in ("", "shapes") else [],
    }
    result["goals"] = goals(result)
    return result


def table(result: dict[str, Any]) -> str:
    """The lines as text: ms, GB/s, percent of the roofline, ratios to ``sjlt`` and ``fast_jl``, error."""
    rows: list[tuple[str, ...]] = [("spec", "input", "backend", "ms", "GB/s", "% read", "x sjlt", "x fast_jl", "error")]
    for line in result["lines"]:
        case = line["case"]
        tag = f"{case['batch']}x{case['p']}"
        tag += "" if case["dtype"] == "float32" else f" {case['dtype']}"
        tag += "" if case["density"] == 1.0 else f" {case['density']:.1%} dense"
        if line["ms"] is None:
            rows.append((case["spec"], tag, case["backend"], line["note"], "", "", "", "", ""))
            continue
        ratios = [ratio(result, line, "sjlt"), ratio(result, line, "fast_jl")]
        fraction = line["roofline_fraction"]
        error = line["relative_error"]
        rows.append(
            (
                case["spec"],
                tag,
                case["backend"],
                f"{line['ms']:.4f}",
                f"{line['read_bytes_per_second'] / 1e9:.0f}",
                "" if fraction is None else f"{100 * fraction:.0f}",
                *("" if value is None else f"{value:.1f}" for value in ratios),
                "" if error is None else f"{error:.1e}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def summary(result: dict[str, Any]) -> str:
    """The table, and below it the goals with what was measured."""
    lines = [table(result)]
    for line in result["grass_sweep"]:
        lines.append(
            f"grass, {line['kept']:,} kept of p = {line['p']:,}: {line['build_and_project_ms']:.2f} ms with building, "
            f"{line['project_ms']:.4f} ms without"
        )
    lines += [goal_line(goal) for goal in result["goals"]]
    return "\n".join(lines)


def ratio(result: dict[str, Any], line: dict[str, Any], package: str) -> float | None:
    """How many times faster a line is than a package on the same input; None where there is nothing to compare."""
    same = ("part", "batch", "p", "k", "dtype", "density")
    nonzeros = line["case"]["spec"].split("-")[0]
    for other in result["lines"]:
        if other["case"]["backend"] != package or other["ms"] is None or line["ms"] is None:
            continue
        if any(other["case"][field] != line["case"][field] for field in same):
            continue
        if package == "sjlt" and nonzeros.startswith("sjlt_") != other["case"]["spec"].startswith("sjlt_"):
            continue
        return other["ms"] / line["ms"]
    return None


def _lines(cases: Sequence[Case], device: torch.device, repeats: int, speed: float | None) -> Iterable[Line]:
    inputs: list[Tensor] = []
    made_for: tuple[object, ...] = ()
    reference: tuple[object, Tensor | None] = ((), None)
    for case in tqdm(cases, desc="projections", leave=False):
        wanted = (case.batch, case.p, case.dtype, case.density)
        if made_for != wanted:
            inputs.clear()
            inputs = _inputs(case, device)
            made_for = wanted
        if reference[0] != (*wanted, case.spec):
            exact = build_projector(case.spec, case.p, device=device, dtype=torch.float64, backend="torch")
            reference = ((*wanted, case.spec), exact(inputs[0][:_CHECKED_ROWS].double()))
            del exact
        yield _line(case, inputs, reference[1], repeats, speed)


def _inputs(case: Case, device: torch.device) -> list[Tensor]:
    dtype = getattr(torch, case.dtype)
    size = case.batch * case.p * dtype.itemsize
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = []
    for _ in range(max(2, min(32, -(-_ROTATION_BYTES // size)))):
        x = torch.empty(case.batch, case.p, device=device, dtype=dtype).normal_(generator=generator)
        if case.density < 1.0:
            for row in x:
                row *= torch.rand(case.p, device=device, generator=generator) < case.density
        inputs.append(x)
    return inputs


def _line(case: Case, inputs: list[Tensor], exact: Tensor | None, repeats: int, speed: float | None) -> Line:
    try:
        projector: Callable[[Tensor], Tensor]
        if case.backend in PACKAGES:
            projector = package_call(case, inputs[0].device)
        else:
            projector = build_projector(
                case.spec, case.p, device=inputs[0].device, dtype=inputs[0].dtype, backend=case.backend
            )
        result = projector(inputs[0])
    except (GrassError, torch.OutOfMemoryError) as error:
        return Line(case, note=f"not measured: {str(error).splitlines()[0]}")
    first = _once(projector, inputs[0])
    if first > _SLOWEST_MS:
        return Line(case, note=f"not repeated: one call takes {first:.0f} ms")
    timing = measure(projector, inputs, repeats)
    size = inputs[0].numel() * inputs[0].element_size()
    rate = size / (1e-3 * timing.median)
    error = ratio_of_norms = None
    if exact is not None:
        rows = result[:_CHECKED_ROWS].double()
        if case.backend == "fast_jl":
            rows = rows / case.k**0.5
        ratio_of_norms = float(rows.norm() / inputs[0][:_CHECKED_ROWS].double().norm())
        if case.backend != "fast_jl":  # it has a matrix of its own
            error = float((rows - exact).norm() / exact.norm())
    touches_all = not case.spec.startswith(("random_mask", "grass"))
    return Line(
        case,
        timing.median,
        timing.low,
        timing.high,
        timing.repeats,
        rate,
        rate / speed if speed and touches_all else None,
        error,
        ratio_of_norms,
    )


def _once(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """One call by the clock, ms; whatever a first call prepares is already there."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _grass_sweep(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Time of grass at 32,768 kept coordinates for growing p: building (indices and tables) and projecting."""
    lines = []
    spec = f"grass-{_GRASS_KEPT // 4}"
    for p in (1_000_000, 10_000_000, 100_000_000):
        x = [torch.empty(_GRASS_BATCH, p, device=device).normal_() for _ in range(2)]
        projector = build_projector(spec, p, device=device, backend="kernel")

        def build(rows: Tensor, p: int = p) -> Tensor:
            return build_projector(spec, p, device=device, backend="kernel")(rows)

        lines.append(
            {
                "p": p,
                "kept": _GRASS_KEPT,
                "batch": _GRASS_BATCH,
                "build_and_project_ms": _wall(build, x, repeats),
                "project_ms": measure(projector, x, repeats).median,
            }
        )
        x.clear()
    return lines


def _wall(call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], repeats: int) -> float:
    """Median ms by the clock: building waits for the device, so events behind a head start would not see it."""
    for x in inputs:
        call(x)
    times = []
    for i in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(inputs[i % len(inputs)])
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
