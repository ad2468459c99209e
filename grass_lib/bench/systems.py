"""`grass bench systems`: tokens per second, memory and bytes stored of every system on one model's shape, one device.

Random weights and random tokens: throughput does not depend on them. A run that was cut off goes on, on the same
machine, with the rows that it lacks. The other systems need `make baselines` with a
build of torch for the device; a machine that has no such venv takes a Python that finds them (``--python``). Without
the command line's packages: ``python -m grass_lib.bench.systems --shape tiny --device cpu``.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from grass_lib.baselines.environment import baselines_python
from grass_lib.baselines.plan import sides
from grass_lib.baselines.process import package_digest, run_system
from grass_lib.baselines.systems import Options, check_systems
from grass_lib.baselines.workload import Outcome, Workload
from grass_lib.bench.results import write
from grass_lib.bench.systems_plan import CLAIMED_AGAINST, SETTINGS, Setting, options_for
from grass_lib.errors import BaselineError, UsageError
from grass_lib.project import runs_root
from grass_lib.words import faster

logger = logging.getLogger(__name__)

SCHEMA = 1


def run(
    shape: str,
    *,
    device: str = "auto",
    systems: str = "",
    tokens: int = 0,
    k: int = 0,
    python: Path | None = None,
    folder: Path | None = None,
    timeout: float = 3600.0,
    repeats: int = 1,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measures one shape; a system that fails leaves its error in the result, and the others go on.

    Args:
        shape: Key of `SETTINGS`.
        device: ``cuda``, ``cpu`` or ``auto``.
        systems: With commas between them; empty for all that take part.
        tokens: Of the training set; 0 for the setting's own.
        k: Compressed size of a layer, a square such as 16,384, LogIX's rank 128; 0 for the setting's own.
        python: Has the other systems; None for that of ``.venv-baselines``.
        folder: Where stores go while they are measured; None for a temporary folder.
        timeout: Seconds for each set of options.
        repeats: How often each is measured, in turn.
        out: Where the JSON goes after every row; where a run was cut off, its rows of the same work, source and machine
            since it was started are kept. None for nowhere.

    Returns:
        What `write` stores.

    Raises:
        UsageError: The shape, a system or a number is wrong, or the other systems are not installed.
    """
    if shape not in SETTINGS:
        raise UsageError(f"shape is {shape!r}; expected one of {', '.join(SETTINGS)}")
    if tokens < 0 or repeats < 1:
        raise UsageError(
            f"tokens is {tokens} and repeats {repeats}; expected 0 (the setting's own) or more, and 1 or more"
        )
    setting = SETTINGS[shape]
    if k:
        sides([k])
        setting = replace(setting, k=k)
    chosen = [name for name in check_systems(systems) if name in setting.systems]
    if not chosen:
        raise UsageError(
            f"none of {systems} takes part at shape {shape}; expected some of {', '.join(setting.systems)}"
        )
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    runner = python or baselines_python()
    workload, options_of = _workload(setting, where, tokens), options_for(setting, where)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": f"grass bench systems --shape {shape}" + (f" --k {k}" if k else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if where.startswith("cuda") else platform.machine(),
        "device_type": where.split(":")[0],
        "shape": shape,
        "model": json.loads(json.dumps(asdict(setting.shape))),
        "tokens": workload.tokens,
        "length": setting.length,
        "batch_size": setting.batch_size,
        "warm_up": setting.warm_up,
        "k": setting.k,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": machine_id(),
        "source": package_digest(),
        "planned": [],
        "rows": [],
    }
    plan = [(number, options) for number in range(repeats) for name in chosen for options in options_of[name]]
    result["planned"] = [options.label for _, options in plan]
    keys = [_key(options.system, options.to_json(), number) for number, options in plan]
    done = _kept(out, result, keys)
    # What the claim compares comes first: a run that is cut off has it.
    order = sorted(range(len(plan)), key=lambda place: not _claimed(plan[place][1].system, plan[place][1].to_json()))
    for count, place in enumerate(order):
        key, (number, options) = keys[place], plan[place]
        if key in done:
            continue
        logger.info("%s (%d of %d)", options.label, count + 1, len(plan))
        home = None if folder is None else folder / f"{options.system}-{place}"
        done[key] = _measure(options.system, workload, options, runner, home, timeout, number)
        result["rows"] = [done[own] for own in keys if own in done]
        claim = throughput_percent_faster(result["rows"])
        if claim is not None:
            result["throughput_percent_faster"] = claim
        if out is not None:
            write(result, out)
    return result


def file_stem(shape: str, k: int = 0) -> str:
    """Name of a result's file without suffix; another size than the shape's own has another one."""
    return f"systems-{shape}" + (f"-{k}" if k else "")


def throughput_percent_faster(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """By how many percent our FactGraSS is faster than LogIX's LoGra, both ready to score; the best of repeats each."""
    best: dict[str, float] = {}
    for row in rows:
        kind, speed = _claimed(row["system"], row["options"]), row.get("tokens_per_second_ready")
        if kind and speed:
            best[kind] = max(best.get(kind, 0.0), float(speed))
    return 100.0 * (best["ours"] / best["logix"] - 1.0) if len(best) == 2 else None


def _claimed(system: str, options: Mapping[str, Any]) -> str:
    """Which side of the claim a system with its options is, "ours" or "logix"; empty for neither."""
    if system == "grass_lib" and options.get("spec", "").startswith("random_mask"):
        return "ours" if options["hessian"] == "eFIM" else ""
    return system if system == "logix" and options["hessian"] == "raw" else ""


def summary(result: Mapping[str, Any]) -> str:
    """The rows as text."""
    lines: list[tuple[str, ...]] = [("system", "tokens/s, one walk", "tokens/s, ready", "peak GB", "stored GB")]
    for row in result["rows"]:
        if row["error"]:
            lines.append((row["label"], row["error"].splitlines()[0][:100], "", "", ""))
            continue
        walk, ready, peak = row["tokens_per_second"], row["tokens_per_second_ready"], row["peak_bytes"]
        shown = "" if peak is None else f"{peak / 1e9:.2f}"
        lines.append((row["label"], f"{walk:,.0f}", f"{ready:,.0f}", shown, f"{row['stored_bytes'] / 1e9:.3f}"))
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if result.get("throughput_percent_faster") is not None:
        text.append(f"FactGraSS is {faster(result['throughput_percent_faster'], CLAIMED_AGAINST)}")
    return "\n".join(text)


def machine_id() -> str:
    """A hash that stays the same on one machine until it is started again: only then do timings compare."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text(encoding="ascii") if boot.is_file() else ""
    return hashlib.sha256(f"{platform.node()} {started}".encode()).hexdigest()[:16]


def _key(system: str, options: Mapping[str, Any], number: int) -> str:
    return json.dumps([system, options, number], sort_keys=True)


def _kept(path: Path | None, head: Mapping[str, Any], keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of a run that was cut off, by key, which this one would measure in just the same way; failed ones are not.

    A run that was whole is no reason to measure nothing.
    """
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fits = all(found.get(name) == head[name] for name in head if name not in ("rows", "date", "planned"))
        rows = [row for row in found["rows"] if not row["error"]] if fits else []
        kept = {_key(row["system"], row["options"], row["repeat"]): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {} if set(keys) <= set(kept) else {key: kept[key] for key in keys if key in kept}


def _workload(setting: Setting, device: str, tokens: int) -> Workload:
    count = max(1, (tokens or setting.tokens) // setting.length)
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, setting.vocabulary, (count, setting.length), generator=generator)
    return Workload(
        setting.shape, train, train[:0], None, batch_size=setting.batch_size, device=device, warm_up=setting.warm_up
    )


def _measure(
    name: str, workload: Workload, options: Options, python: Path, folder: Path | None, timeout: float, number: int
) -> dict[str, Any]:
    """One process for one set of options: nothing of the one before is left in memory."""
    row: dict[str, Any] = {"system": name, "label": options.label, "options": options.to_json(), "repeat": number}
    try:
        (found,) = run_system(name, workload, [options], folder=folder, timeout=timeout, python=python)
    except BaselineError as error:
        return {**row, "error": str(error)}
    return {**row, "error": "", **_numbers(found, workload.tokens)}


def _numbers(found: Outcome, tokens: int) -> dict[str, Any]:
    return {
        "version": found.version,
        "seconds": dict(found.seconds),
        "peak_bytes": max(found.peak_bytes.values(), default=None),
        "peak_bytes_by_phase": dict(found.peak_bytes),
        "stored_bytes": found.stored_bytes,
        "tokens_per_second": found.tokens_per_second(tokens, curvature=False),
        "tokens_per_second_ready": found.tokens_per_second(tokens, curvature=True),
        "details": dict(found.details),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m grass_lib.bench.systems")
    parser.add_argument("--shape", default="gpt2", choices=tuple(SETTINGS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--systems", default="")
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = run(
        given.shape,
        device=given.device,
        systems=given.systems,
        tokens=given.tokens,
        k=given.k,
        python=given.python,
        timeout=given.timeout,
        repeats=given.repeats,
        out=given.json or runs_root() / "bench" / f"{file_stem(given.shape, given.k)}.json",
    )
    sys.stdout.write(summary(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
