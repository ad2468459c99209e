"""What a batch would run: every input checked, and every finished identical run found, before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.errors import GrassError, RecordError, SpecError, UsageError
from grass_lib.project import project_root, runs_root
from grass_lib.report.environment import module_hashes, template_hash
from grass_lib.runner.parameters import Parameter, check_value, parameter_hash, read_parameters, resolve
from grass_lib.runner.verify import INTERRUPTED, STATUS, load_status, verify_run, without_remedy
from grass_lib.seeds import check_seed

if TYPE_CHECKING:
    from grass_lib.experiments import Experiment

SCALES = ("embedded", "paper")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a batch.

    Attributes:
        experiment: key of the experiment.
        scale: ``embedded`` or ``paper``.
        run_id: ``<experiment>-<scale>-<8 hexadecimal digits of the parameters>``.
        root: the project's root; the kernel starts there.
        folder: the run's folder.
        template: path of the notebook.
        parameters: all parameters but ``scale`` and ``run_id``.
        changed: names of those that differ from the template's defaults.
        data_fingerprint: hash of the data, None where the data cannot be had here.
        template_sha256: hash of the template.
        modules: hash of the source of each declared module.
        problems: why it cannot run here, one sentence each.
        pending: why it has to run; empty where an identical run is finished.
        left_out: why a batch that names no experiments does without it; empty where it does not.
    """

    experiment: str
    scale: str
    run_id: str
    root: Path
    folder: Path
    template: Path
    parameters: dict[str, Any]
    changed: tuple[str, ...]
    data_fingerprint: str | None
    template_sha256: str
    modules: dict[str, str]
    problems: tuple[str, ...] = ()
    pending: str = ""
    left_out: str = ""

    @property
    def finished(self) -> bool:
        """Whether an identical run is finished and verified."""
        return not self.pending


def experiments_by_name() -> Mapping[str, Experiment]:
    """The registered experiments, in the order of the paper."""
    from grass_lib.experiments import EXPERIMENTS

    return EXPERIMENTS


def template_path(root: Path, experiment: Experiment) -> Path:
    """Path of an experiment's notebook, which is given by name or relative to the root."""
    return root / "notebooks" / Path(experiment.notebook).name


def check_names(names: Sequence[str]) -> list[str]:
    """The experiments that a user asked for, once each, all of them for an empty list.

    Args:
        names: keys of experiments.

    Raises:
        UsageError: an unknown one.
    """
    known = list(experiments_by_name())
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; choose one of them"
            raise UsageError(f"experiment {name!r} is not known, expected {', '.join(known)}{hint}")
    return list(dict.fromkeys(names)) or known


def check_scale(scale: str) -> str:
    """The scale, if it is one.

    Raises:
        UsageError: it is neither ``embedded`` nor ``paper``.
    """
    if scale not in SCALES:
        raise UsageError(
            f"scale is {scale!r}, expected 'embedded' (small, any machine) or 'paper' (the paper's sizes, on a GPU)"
        )
    return scale


def check_specs(values: Mapping[str, Any]) -> None:
    """Parses every spec among the parameters, so that a wrong one fails before any model or data is loaded.

    Args:
        values: parameters by name; ``specs``, ``sparsification``, ``projection`` and ``hessian`` are looked at.

    Raises:
        SpecError: one that cannot be parsed, or that is there twice.
    """
    from grass_lib.specs import StageSpec, parse_hessian, parse_specs

    specs = values.get("specs") or []
    for text in specs.split(",") if isinstance(specs, str) else specs:
        if not text.strip():
            raise SpecError(
                f"parameter 'specs' is {specs!r}, with an empty entry; expected specs with one comma between them"
            )
    parse_specs(specs)
    for name in ("sparsification", "projection"):
        if values.get(name):
            StageSpec.parse(values[name])
    if values.get("hessian"):
        parse_hessian(values["hessian"])


def compression_parameters(sparsifications: Sequence[str], projections: Sequence[str]) -> dict[str, str]:
    """The parameter ``specs`` from ``--sparsification`` and ``--projection``, paired in their order.

    Args:
        sparsifications: stage 1 of each pair; none means ``identity`` for all.
        projections: stage 2 of each pair; none means ``identity`` for all.

    Returns:
        ``{"specs": "A->B,C->D"}``, empty without any.

    Raises:
        UsageError: both are given, and not equally often.
        SpecError: one cannot be parsed.
    """
    from grass_lib.specs import CompressionSpec

    firsts, seconds = list(sparsifications), list(projections)
    if firsts and seconds and len(firsts) != len(seconds):
        raise UsageError(
            f"--sparsification is given {len(firsts)} times and --projection {len(seconds)} times, expected pairs; "
            "give both equally often ('identity' for nothing), or only one of them"
        )
    firsts = firsts or ["identity"] * len(seconds)
    seconds = seconds or ["identity"] * len(firsts)
    pairs = [
        str(CompressionSpec.parse(sparsification=first, projection=second))
        for first, second in zip(firsts, seconds, strict=True)
    ]
    return {"specs": ",".join(pairs)} if pairs else {}


def _missing_parameter(name: str, experiment: str, parameters: Mapping[str, Parameter], flag: str) -> None:
    if name not in parameters:
        raise UsageError(f"{experiment} has no parameter {name!r}, so {flag} means nothing there; leave it out")


def plan(
    names: Sequence[str] = (),
    scale: str = "embedded",
    given: Mapping[str, Any] | None = None,
    *,
    sparsifications: Sequence[str] = (),
    projections: Sequence[str] = (),
    hessian: str | None = None,
    seed: int | None = None,
    typed: bool = False,
) -> list[PlannedRun]:
    """Checks everything that a user gave and says what would run.

    Args:
        names: experiments, none for all.
        scale: ``embedded`` or ``paper``.
        given: parameters by name.
        sparsifications: shortcut for the parameter ``specs``.
        projections: shortcut for the parameter ``specs``.
        hessian: shortcut for the parameter ``hessian``.
        seed: shortcut for the parameter ``seed``.
        typed: whether ``given`` holds Python values (True) or text as typed on a command line.

    Returns:
        One planned run per experiment.

    Raises:
        UsageError: any wrong input; nothing has been run.
        GrassError: a template that cannot be used.
    """
    from grass_lib.specs import parse_hessian

    check_scale(scale)
    chosen = check_names(names)
    values = dict(given or {})
    shortcuts: list[tuple[str, str, Any]] = []
    specs = compression_parameters(sparsifications, projections)
    if specs:
        shortcuts.append(("specs", "--sparsification/--projection", specs["specs"]))
    if hessian is not None:
        shortcuts.append(("hessian", "--hessian", parse_hessian(hessian)))
    if seed is not None:
        check_seed(seed, "--seed")
        shortcuts.append(("seed", "--seed", seed))
    for name, flag, _ in shortcuts:
        if name in values:
            raise UsageError(f"parameter {name!r} is given both by {flag} and by -p; give it once")
    root = project_root()
    planned = [_plan_one(root, name, scale, values, shortcuts, typed) for name in chosen]
    return planned if names else [_without_optional(item) for item in planned]


def _without_optional(planned: PlannedRun) -> PlannedRun:
    """Leaves out an optional experiment that cannot run here and that nobody asked for by name."""
    optional = getattr(experiments_by_name()[planned.experiment], "optional", False)
    return replace(planned, left_out=planned.problems[0]) if optional and planned.problems else planned


def _plan_one(
    root: Path,
    name: str,
    scale: str,
    given: Mapping[str, Any],
    shortcuts: Sequence[tuple[str, str, Any]],
    typed: bool,
) -> PlannedRun:
    experiment = experiments_by_name()[name]
    template = template_path(root, experiment)
    parameters = read_parameters(template)
    for reserved in ("scale", "run_id"):
        if reserved not in parameters or parameters[reserved].type != "str":
            raise GrassError(f"notebooks/{template.name} has no parameter '{reserved}: str'; correct the template")
    for parameter, flag, _ in shortcuts:
        _missing_parameter(parameter, name, parameters, flag)
    values = resolve(parameters, given, experiment=name, typed=typed)
    for parameter, _, value in shortcuts:
        wanted = value.split(",") if parameters[parameter].is_list else value
        values[parameter] = check_value(parameters[parameter], wanted)
    check_specs(values)
    if "seed" in values:
        check_seed(values["seed"], "parameter 'seed'")
    validate = getattr(experiment, "validate", None)
    if validate is not None:
        validate(scale, values)
    run_id = f"{name}-{scale}-{parameter_hash(values)}"
    problems, fingerprint = _problems(experiment, scale)
    planned = PlannedRun(
        experiment=name,
        scale=scale,
        run_id=run_id,
        root=root,
        folder=runs_root(root) / run_id,
        template=template,
        parameters=values,
        changed=tuple(key for key, value in values.items() if value != parameters[key].default),
        data_fingerprint=fingerprint,
        template_sha256=template_hash(template),
        modules=module_hashes(experiment.modules),
        problems=tuple(problems),
    )
    return _with_pending(planned)


def check_experiment(experiment: Experiment, scale: str) -> list[str]:
    """Why an experiment would not work here, one sentence each.

    Args:
        experiment: which one.
        scale: at which scale.
    """
    try:
        return list(experiment.check(scale))
    except GrassError as error:
        return [str(error)]


def _problems(experiment: Experiment, scale: str) -> tuple[list[str], str | None]:
    """Why an experiment cannot run here, and the hash of its data."""
    if scale not in experiment.scales:
        has = " and ".join(experiment.scales)
        return [f"{experiment.name} has no scale {scale!r}; it has {has}"], None
    problems = check_experiment(experiment, scale)
    fingerprint = None
    try:
        fingerprint = experiment.data_fingerprint(scale)
    except GrassError as error:
        if not problems:
            problems.append(str(error))
    if problems:
        others = [name for name in experiment.scales if name != scale and not check_experiment(experiment, name)]
        problems.append(
            f"the scale that works here is {others[0]}: grass run {experiment.name} --scale {others[0]}"
            if others
            else "no other scale works here; `grass doctor` says why"
        )
    return problems, fingerprint


def why_pending(planned: PlannedRun) -> str:
    """Why a run has to be executed; empty where an identical one is finished and whole.

    Args:
        planned: the run.
    """
    if not (planned.folder / STATUS).exists():
        return "never finished" if planned.folder.exists() else "new"
    try:
        status = load_status(planned.folder)
    except RecordError as error:
        return str(error)
    if status.exit_code == INTERRUPTED:
        return "going on with an interrupted run"
    if problems := verify_run(planned.folder):
        return without_remedy(problems[0])
    if status.parameters != planned.parameters:
        return "the parameters changed"
    if status.data_fingerprint != planned.data_fingerprint:
        return "the data changed"
    if status.template_sha256 != planned.template_sha256:
        return "the notebook changed"
    names = sorted(
        name
        for name in status.modules.keys() | planned.modules.keys()
        if status.modules.get(name) != planned.modules.get(name)
    )
    return f"source changed: {', '.join(names)}" if names else ""


def _with_pending(planned: PlannedRun) -> PlannedRun:
    return replace(planned, pending=why_pending(planned))
