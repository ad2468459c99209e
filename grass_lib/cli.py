"""The ``grass`` command. Exit codes: 0 all good, 1 something failed, 2 wrong usage (nothing was run)."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape

from grass_lib.bench.command import app as bench_app
from grass_lib.cli_output import console_for, near, show_doctor, show_ledger, show_outcome, show_plan, show_start
from grass_lib.commands.attribute import attribute
from grass_lib.commands.jobs import app as jobs_app
from grass_lib.commands.masks import masks
from grass_lib.commands.slurm import NoWait, SlurmOptions, run_on_slurm, slurm_settings
from grass_lib.commands.store import app as store_app
from grass_lib.errors import GrassError, UsageError
from grass_lib.runner.execute import INTERRUPTED, Outcome, check_outcomes, run_all
from grass_lib.runner.parameters import describe, read_parameters, split_assignments
from grass_lib.runner.planning import PlannedRun, experiments_by_name, plan, template_path
from grass_lib.runner.preflight import preflight

_HELP = """\
Runs the experiments of the GraSS report, checks the runs, builds the book.

Exit codes: 0 all good, 1 something failed (each failure is named with its log), 2 wrong usage (nothing was run).

Folders: GRASS_DATA (data laid out as on the hub), GRASS_RUNS (where runs go), GRASS_ROOT (the project, if not here).
"""

_RUN_HELP = (
    "Plan, execute and verify notebooks; skip what an identical finished run already gives.\n\n"
    "Every input is checked before anything runs. A run that was killed goes on where it stopped; one failure does not "
    "stop the others. Each run has a folder runs/<run id> with notebook.ipynb, record.json, status.json, log.txt and "
    "store/.\n\nExamples: grass run mlp_mnist -p seed=3;  grass run --projection sjlt-512 --projection normal-512"
)
_VERIFY_HELP = (
    "Check that runs are whole: exit code, executed cells, no errors, the sentinel, the record.\n\n"
    "Without arguments, looks at everything below runs/ and book/measured/; runs that failed or never ended, and those "
    "made by hand in Jupyter, are only mentioned."
)

logger = logging.getLogger(__name__)
app = typer.Typer(
    name="grass",
    help=_HELP,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench_app, name="bench")
app.add_typer(store_app, name="store")
app.add_typer(jobs_app, name="jobs")
app.command()(attribute)
app.command()(masks)
EXECUTORS = ("local", "slurm")
TERMINATED = 143
# What typer raises for words that it cannot make sense of; releases differ in whether they bring their own click along.
_ClickError: Any = next(item for item in typer.BadParameter.__mro__ if item.__name__ == "ClickException")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C so that kernels are stopped in order."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


Experiments = Annotated[list[str] | None, typer.Argument(metavar="EXPERIMENT", help="Which ones; all without any.")]


@app.command()
def doctor(
    experiments: Experiments = None,
    scale: Annotated[str | None, typer.Option(help="Only this scale: embedded or paper.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 if something asked about would not work here.")
    ] = False,
) -> None:
    """Say for every experiment and scale whether it would work here, and what to do if not.

    Needs no network, starts nothing, and exits with 0 unless --strict is given.
    """
    from grass_lib import doctor as doctor_module
    from grass_lib.runner.planning import check_scale

    scales = [check_scale(scale)] if scale else []
    facts, found = doctor_module.machine_facts(), doctor_module.verdicts(experiments or (), scales)
    if as_json:
        value = {
            "machine": [vars(fact) for fact in facts],
            "experiments": [{**vars(item), "works": item.works} for item in found],
        }
        typer.echo(json.dumps(value, indent=1))
    else:
        show_doctor(facts, found)
    if strict and not all(item.works for item in found):
        raise typer.Exit(1)


def _list_parameters(names: Sequence[str]) -> None:
    from grass_lib.project import project_root
    from grass_lib.runner.planning import check_names

    for name in check_names(names):
        typer.echo(describe(read_parameters(template_path(project_root(), experiments_by_name()[name])), name))


@app.command(help=_RUN_HELP)
def run(
    experiments: Experiments = None,
    scale: Annotated[
        str,
        typer.Option(
            help="embedded: small, real data that comes with pip, any machine; paper: the paper's sizes, a GPU."
        ),
    ] = "embedded",
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "-p", "--parameter", metavar="NAME=VALUE", help="A parameter of the notebook; lists are written 1,2."
        ),
    ] = None,
    sparsification: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TYPE-DIM", help="Stage 1, such as random_mask-4096; again for more, paired with --projection."
        ),
    ] = None,
    projection: Annotated[
        list[str] | None, typer.Option(metavar="TYPE-DIM", help="Stage 2, such as sjlt-512; again for more.")
    ] = None,
    hessian: Annotated[
        str | None, typer.Option(help="eFIM or Identity, for experiments with influence functions.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random stream.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option("-j", "--jobs", help="Runs at a time: here 1 unless said, on a cluster as many as it gives."),
    ] = None,
    executor: Annotated[str, typer.Option(help="local, or slurm: one job per run, see `grass jobs`.")] = "local",
    slurm: SlurmOptions = None,
    no_wait: NoWait = False,
    force: Annotated[
        bool, typer.Option("--force", help="Execute finished runs too; what their store/ holds is used again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would run, and stop.")] = False,
    list_parameters: Annotated[
        bool, typer.Option("--list-parameters", help="Show the parameters of the notebooks, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars.")] = False,
) -> None:
    """Plan, execute and verify notebooks."""
    if list_parameters:
        _list_parameters(experiments or ())
        return
    if executor not in EXECUTORS:
        raise UsageError(f"--executor is {executor!r}, expected local or slurm")
    settings = slurm_settings(executor, slurm or (), no_wait)
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs is {jobs}, expected a whole number >= 1")
    planned = plan(
        experiments or (),
        scale,
        split_assignments(parameters or ()),
        sparsifications=sparsification or (),
        projections=projection or (),
        hessian=hessian,
        seed=seed,
    )
    if settings is not None:
        run_on_slurm(planned, settings, parallel=jobs, force=force, wait=not no_wait, dry_run=dry_run)
        return
    if dry_run:
        show_plan(planned, force)
    runnable = [item for item in planned if not item.problems or (item.finished and not force)]
    if not runnable:
        raise UsageError("; ".join(f"{item.experiment}: {'; '.join(item.problems)}" for item in planned))
    jobs = jobs or 1
    preflight(jobs, dry=dry_run)
    if dry_run:
        return
    try:
        with _terminable():
            outcomes = _execute(planned, jobs, force, progress=not quiet)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        console_for(stderr=True).print("stopped; run the same command again to go on")
        raise typer.Exit(TERMINATED if terminated else INTERRUPTED) from error
    check_outcomes(outcomes)


def _execute(planned: Sequence[PlannedRun], jobs: int, force: bool, *, progress: bool) -> list[Outcome]:
    def started(item: PlannedRun) -> None:
        if progress:
            show_start(item)

    return run_all(planned, jobs=jobs, force=force, progress=progress, report=show_outcome, started=started)


@app.command(help=_VERIFY_HELP)
def verify(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="Run ids or folders; all finished ones without any.")
    ] = None,
) -> None:
    """Check that runs are whole."""
    from grass_lib.project import missing_runs, runs_root
    from grass_lib.runner.collect import find_run, is_manual, run_folders
    from grass_lib.runner.verify import in_one_sentence, unfinished, verify_run

    folders = [find_run(name) for name in runs] if runs else run_folders()
    bad = looked_at = 0
    for folder in folders:
        if not runs and is_manual(folder):
            typer.echo(f"manual  {near(folder)}: made by hand, does not count")
        elif not runs and folder.parent == runs_root() and (why := unfinished(folder)):
            typer.echo(f"open    {near(folder)}: does not count, {why}")
        else:
            problems = verify_run(folder)
            looked_at, bad = looked_at + 1, bad + bool(problems)
            said = f": {in_one_sentence(problems)}" if problems else ""
            typer.echo(f"{'BAD' if problems else 'ok':<7} {near(folder)}{said}")
    if not runs and (missing := missing_runs()):
        typer.echo(missing)
    elif not folders:
        typer.echo("no runs; make one with `grass run`")
    if bad:
        raise GrassError(f"{bad} of {looked_at} runs do not verify; what to do is said with each of them")


@app.command()
def book() -> None:
    """Build the book from the newest verified runs, and print the path of its first page."""
    from grass_lib.project import missing_runs, project_root
    from grass_lib.report.book import build

    if missing := missing_runs():
        logger.warning("%s", missing)
    typer.echo("collecting the runs and building the pages; this takes a quarter of a minute", err=True)
    index = build(project_root(), strict=True)
    typer.echo(f"the book is at {near(index)}")


@app.command()
def ledger(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per published figure, as a list.")
    ] = False,
    experiment: Annotated[str | None, typer.Option(help="Only this experiment.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Only lds, projection_seconds or throughput_percent_faster.")
    ] = None,
) -> None:
    """Print every published figure with ours, its interval, a verdict and the reason.

    Only verified runs at paper scale count as measured.
    """
    from grass_lib.report.claims import THROUGHPUT
    from grass_lib.report.ledger import METRICS, ledger_rows
    from grass_lib.runner.collect import verified_records

    rows = ledger_rows(verified_records(scale="paper"))
    known = list(dict.fromkeys(row["experiment"] for row in rows))
    if experiment is not None and experiment not in known:
        raise UsageError(f"--experiment is {experiment!r}, expected one of {', '.join(known)}")
    if metric is not None and metric not in (*METRICS, THROUGHPUT):
        raise UsageError(f"--metric is {metric!r}, expected one of {', '.join((*METRICS, THROUGHPUT))}")
    rows = [row for row in rows if experiment in (None, row["experiment"]) and metric in (None, row["metric"])]
    if as_json:
        typer.echo(json.dumps(rows, indent=1, allow_nan=False))
    else:
        show_ledger(rows)


def _fail(error: GrassError) -> int:
    console_for(stderr=True).print(f"[red]error:[/] {escape(str(error))}")
    return error.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: words behind ``grass``; None takes those of the process.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    command = typer.main.get_command(app)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = command.main(args=words or ["--help"], prog_name="grass", standalone_mode=False)
    except GrassError as error:
        return _fail(error)
    except _ClickError as error:
        context, said = getattr(error, "ctx", None), error.format_message().strip()
        if context is not None and type(error).__name__ == "NoArgsIsHelpError":
            if said:  # typer's own pages are shown already when the exception is made
                console_for(stderr=True).print(escape(said))
            return UsageError.exit_code
        path = "grass" if context is None else context.command_path
        said = said if said.endswith((".", "!", "?")) else f"{said}."
        console_for(stderr=True).print(f"[red]error:[/] {escape(said)} See `{path} --help`.")
        return UsageError.exit_code
    if not words:
        return UsageError.exit_code
    return result if isinstance(result, int) else 0
