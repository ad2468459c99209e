"""Every system on one workload, and each checked against ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grass_lib.baselines.crosscheck import FEW, Check, checks, judge
from grass_lib.baselines.process import run_system
from grass_lib.baselines.systems import SYSTEMS, Options
from grass_lib.baselines.workload import ModelShape, Outcome, Workload

_LARGE = 256
"""Width from which checks run on a small model: some of them keep whole gradients, and factors in float64."""
_SMALL = {"layers": 2, "width": 64, "heads": 4, "positions": 128}


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        outcomes: Options and what they gave, system by system.
        checks: What `judge` gave for each check.
        facts: What each system did when it was used as documented, with its title as ``system``.
    """

    outcomes: list[tuple[Options, Outcome]]
    checks: list[dict[str, Any]]
    facts: list[dict[str, Any]]

    @property
    def versions(self) -> dict[str, str]:
        """Of the systems, by key."""
        return {outcome.system: outcome.version for _, outcome in self.outcomes}


def check_workload(workload: Workload) -> Workload:
    """What systems are checked on: the workload, or the first of its blocks on a small model of the same kind.

    Args:
        workload: Of the comparison.
    """
    sizes = workload.shape.sizes
    if workload.shape.kind != "gpt2" or sizes.get("width", 768) < _LARGE:
        return workload
    length = _SMALL["positions"]
    shape = ModelShape("gpt2", {**_SMALL, "vocabulary": sizes.get("vocabulary", 50257)}, seed=workload.shape.seed)
    ids = (workload.train_ids[:FEW, :length], workload.query_ids[:FEW, :length])
    return replace(workload, shape=shape, train_ids=ids[0], query_ids=ids[1], weights=None)


def compare(
    plan: Mapping[str, Sequence[Options]],
    workload: Workload,
    *,
    folder: Path,
    at_once: bool = False,
    timeout: float = 3 * 3600.0,
    phase: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
) -> Comparison:
    """Runs the systems, one after the other or all at the same time, and checks each.

    Args:
        plan: Options by system.
        workload: What all of them work on.
        folder: Each system has a folder of its own in it, from which a killed comparison goes on.
        at_once: All systems at the same time; seconds and memory then say nothing.
        timeout: Seconds for each system.
        phase: Called with a name around every part of the work, such as `Run.phase`.

    Returns:
        What was found.

    Raises:
        UsageError: A system is not known or not installed, or options are of another one.
        BaselineError: A worker failed; with ``at_once``, once the others have ended. What was found is kept.
    """
    small = check_workload(workload)

    def one(system: str) -> _Found:
        return _run(system, list(plan[system]), workload, small, folder / system, timeout)

    if at_once:
        with phase("all systems"), ThreadPoolExecutor(max(1, len(plan))) as pool:
            answers = dict(zip(plan, pool.map(one, plan), strict=True))
    else:
        answers = {}
        for system in plan:
            with phase(SYSTEMS[system].title):
                answers[system] = one(system)
    with phase("checks"):
        judged = [judge(small, check, answer) for found in answers.values() for check, answer in found.checked]
    return Comparison(
        outcomes=[pair for system in plan for pair in zip(plan[system], answers[system].outcomes, strict=True)],
        checks=judged,
        facts=[{"system": SYSTEMS[system].title, **fact} for system in plan for fact in answers[system].facts],
    )


@dataclass(frozen=True)
class _Found:
    outcomes: list[Outcome]
    checked: list[tuple[Check, Outcome]]
    facts: list[dict[str, Any]]


def _run(
    system: str, options: list[Options], workload: Workload, small: Workload, folder: Path, timeout: float
) -> _Found:
    """One system; checks have a process of their own only where they have a model of their own."""
    same = checks(system)
    extra = [check.options for check in same]
    if small is workload:
        found = run_system(system, workload, extra + options, folder=folder, timeout=timeout, facts=True)
        few, many = found[: len(extra)], found[len(extra) :]
        facts = (few or many)[0].details["facts"]
    else:
        few, facts = [], []
        if extra:
            few = run_system(system, small, extra, folder=folder / "checks", timeout=timeout, facts=True)
            facts = few[0].details["facts"]
        many = run_system(system, workload, options, folder=folder, timeout=timeout)
    return _Found(many, list(zip(same, few, strict=True)), facts)
