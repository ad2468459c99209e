"""What the ``grass`` command prints."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from grass_lib.cluster.watch import JobState
    from grass_lib.doctor import Fact, Verdict
    from grass_lib.runner.execute import Outcome
    from grass_lib.runner.planning import PlannedRun


def console_for(*, stderr: bool = False) -> Console:
    """A console for standard output or standard error."""
    # Piped output is not cut at 80 columns: a log that hides the end of a message is of no use.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Console(stderr=stderr, highlight=False, width=width, soft_wrap=True)


def near(path: Path) -> str:
    """A path as short as possible from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def show_plan(planned: Sequence[PlannedRun], force: bool) -> None:
    """Prints what a batch would run."""
    for item in planned:
        skip = item.finished and not force
        if item.left_out:
            what = f"left out: {item.left_out}"
        elif item.problems and not skip:
            what = "cannot run here: " + "; ".join(item.problems)
        else:
            what = "skip, an identical run is finished" if skip else f"run ({item.pending or 'forced'})"
        console_for().print(f"{item.run_id}: {what}")
        if item.changed:
            console_for().print("  " + ", ".join(f"{name}={item.parameters[name]!r}" for name in item.changed))


def show_start(planned: PlannedRun) -> None:
    """Prints that a run begins, and why."""
    why = f"{planned.run_id} ({planned.pending or 'forced'})"
    log = near(planned.folder / "log.txt")
    console_for(stderr=True).print(f"running   {escape(why)}; to follow: tail -f {escape(log)}")


def show_outcome(outcome: Outcome) -> None:
    """Prints how a run ended."""
    console = console_for(stderr=True)
    name = outcome.planned.run_id
    if outcome.state == "done":
        console.print(f"[green]done[/]      {name} in {outcome.seconds:.0f} s, {escape(near(outcome.planned.folder))}")
    elif outcome.state == "skipped":
        console.print(f"[green]skipped[/]   {name}: {escape(outcome.message)} ({escape(near(outcome.planned.folder))})")
    else:
        log = f" (log: {near(outcome.log)})" if outcome.log.exists() and outcome.state != "busy" else ""
        console.print(f"[red]{outcome.state:<9}[/] {name}: {escape(outcome.message)}{escape(log)}")


def show_job(state: JobState) -> None:
    """Prints how a job ended."""
    colour = "green" if state.good else "red"
    more = f": {state.message} (log: {near(Path(state.job.log))})" if not state.good else ""
    text = f"[{colour}]{state.state:<9}[/] {escape(state.job.name)}, job {state.job.id}{escape(more)}"
    console_for(stderr=True).print(text)


def show_jobs(states: Sequence[JobState]) -> None:
    """Prints how jobs stand, one a line."""
    if not states:
        return
    table = Table("job", "state", "makes", "time", "node", "log", box=None, header_style="bold")
    for state in states:
        colour = "yellow" if state.active else "green" if state.good else "red"
        entry = state.entry
        place = (
            (entry.node or f"({entry.reason})") if entry is not None and entry.active else entry.node if entry else ""
        )
        cells = [state.job.name, entry.elapsed if entry else "", place, near(Path(state.job.log))]
        table.add_row(state.job.id, f"[{colour}]{state.state}[/]", *(escape(cell) for cell in cells))
    console = console_for()
    console.print(table)
    for state in states:
        if state.message:
            console.print(f"{state.job.id} {escape(state.job.name)}: {escape(state.message)}")


def show_doctor(facts: Sequence[Fact], verdicts: Sequence[Verdict]) -> None:
    """Prints what is on this machine and what would work on it."""
    console = console_for()
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]-[/]"}
    table = Table("", "this machine", "", "what to do", box=None, header_style="bold")
    for fact in facts:
        table.add_row(marks[fact.good], fact.name, escape(fact.value), escape(fact.advice))
    console.print(table)
    table = Table("", "experiment", "scale", "works here", box=None, header_style="bold")
    for item in verdicts:
        text = f"yes: grass run {item.experiment} --scale {item.scale}"
        text = text if item.works else "no: " + "; ".join(item.problems)
        table.add_row(marks[item.works], item.experiment, item.scale, escape(text))
    console.print()
    console.print(table)


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if metric == "lds" else f"{value:.4g}"


def show_ledger(rows: Sequence[dict[str, Any]]) -> None:
    """Prints ledger rows, one table per experiment and metric."""
    from grass_lib.report.ledger import METRIC_TITLES

    colours = {"reproduced": "green", "differs": "red", "not comparable": "yellow", "not run": "dim"}
    console = console_for()
    for experiment, metric in dict.fromkeys((row["experiment"], row["metric"]) for row in rows):
        chosen = [row for row in rows if (row["experiment"], row["metric"]) == (experiment, metric)]
        title = f"{experiment}: {METRIC_TITLES.get(metric, metric)}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        for name in ("compression", "published", "measured", "95 % interval", "verdict", "reason"):
            table.add_column(name, justify="right" if name in ("published", "measured") else "left")
        reasons = {row["reason"] for row in chosen}
        shared = len(reasons) == 1
        for row in chosen:
            stages = [stage for stage in (row["sparsification"], row["projection"]) if stage not in (None, "identity")]
            interval = f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}" if row["interval"] else ""
            verdict = f"[{colours[row['verdict']]}]{row['verdict']}[/]"
            numbers = [_number(row[name], metric) for name in ("published", "measured")]
            table.add_row(" -> ".join(stages), *numbers, interval, verdict, "" if shared else escape(row["reason"]))
        console.print(table)
        if shared:
            console.print(f"[dim]{escape(reasons.pop())}[/]")
        console.print()
    counts = Counter(row["verdict"] for row in rows if row["metric"] == "lds")
    console.print("LDS rows: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
