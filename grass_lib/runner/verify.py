"""Whether a run counts: the five tests of an executed notebook and its record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from grass_lib.errors import RecordError
from grass_lib.report.files import file_sha256
from grass_lib.report.record import SENTINEL
from grass_lib.report.schema import load_record

STATUS_VERSION = 1
INTERRUPTED = 130
NOTEBOOK, RECORD, STATUS, PART, LOG = "notebook.ipynb", "record.json", "status.json", "notebook.part.ipynb", "log.txt"
_AGAIN, _SEE_LOG = "; run again", f"; see {LOG} and run again"
_SENTINEL = re.compile(rf"^{SENTINEL} (\S+) ([0-9a-f]{{64}})$", re.MULTILINE)


@dataclass(frozen=True)
class Status:
    """What the runner stamps on a run as its very last act (``status.json``).

    Attributes:
        run_id: name of the run.
        experiment: key of the experiment.
        scale: ``embedded`` or ``paper``.
        exit_code: that of the process that executed the notebook; 0 is good.
        started: ISO 8601 with time zone.
        ended: ISO 8601 with time zone.
        parameters: all parameters, without ``scale`` and ``run_id``.
        changed: names of the parameters that differ from the template's defaults.
        data_fingerprint: hash of the data.
        template_sha256: hash of the template's cells.
        modules: hash of the source of each declared module.
        notebook_sha256: hash of ``notebook.ipynb``, null where the run failed.
        error: what failed, null where nothing did.
        schema_version: version of this file.
    """

    run_id: str
    experiment: str
    scale: str
    exit_code: int
    started: str
    ended: str
    parameters: dict[str, Any]
    changed: list[str]
    data_fingerprint: str | None
    template_sha256: str
    modules: dict[str, str]
    notebook_sha256: str | None
    error: str | None
    schema_version: int = STATUS_VERSION


def load_status(folder: Path) -> Status:
    """Reads ``status.json`` of a run.

    Args:
        folder: the run's folder.

    Raises:
        RecordError: it is missing or not what the runner writes.
    """
    try:
        value = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(
            f"no exit code: {STATUS} is missing, so the run was killed, is still going on, or was made by hand; "
            "make it with `grass run`"
        ) from error
    except (OSError, ValueError) as error:
        raise RecordError(f"no exit code: {STATUS} is not readable ({type(error).__name__}); run again") from error
    names = {item.name for item in fields(Status)}
    if not isinstance(value, dict) or value.keys() != names or value["schema_version"] != STATUS_VERSION:
        raise RecordError(f"no exit code: {STATUS} does not follow its schema (version {STATUS_VERSION}); run again")
    return Status(**value)


def _check_status(folder: Path) -> tuple[list[str], Status | None]:
    try:
        status = load_status(folder)
    except RecordError as error:
        return [str(error)], None
    if status.exit_code == INTERRUPTED:
        return [f"exit code is {INTERRUPTED}, interrupted; run the same command again to go on"], status
    if type(status.exit_code) is not int or status.exit_code != 0:
        why = f" ({status.error})" if status.error else ""
        return [f"exit code is {status.exit_code}, expected 0{why}{_SEE_LOG}"], status
    return [], status


def _outputs_text(cell: Mapping[str, Any]) -> str:
    parts = []
    for output in cell.get("outputs", ()):
        text = (
            output.get("text")
            if output.get("output_type") == "stream"
            else output.get("data", {}).get("text/plain", "")
        )
        parts.append("".join(text or ""))
    return "\n".join(parts)


def _check_cells(cells: list[Mapping[str, Any]]) -> list[str]:
    problems = []
    code = [(place, cell) for place, cell in enumerate(cells) if cell.get("cell_type") == "code"]
    skipped = [
        str(place) for place, cell in code if "".join(cell["source"]).strip() and not cell.get("execution_count")
    ]
    if skipped:
        problems.append(f"cell {', '.join(skipped)} was not executed (no execution count); run again")
    for place, cell in code:
        for output in cell.get("outputs", ()):
            if output.get("output_type") == "error":
                problems.append(
                    f"cell {place} shows an error, {output.get('ename')}: {output.get('evalue')}; run again"
                )
    return problems


def _check_sentinel(cells: list[Mapping[str, Any]], folder: Path) -> list[str]:
    code = [cell for cell in cells if cell.get("cell_type") == "code" and "".join(cell["source"]).strip()]
    found = _SENTINEL.findall(_outputs_text(code[-1])) if code else []
    if len(found) != 1:
        return [f"the last cell shows {len(found)} sentinels, expected 1; end the notebook with run.finish()"]
    try:
        digest = file_sha256(folder / RECORD)
        run_id = json.loads((folder / RECORD).read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a record that is missing or no JSON is named by its own test
    if found[0][1] != digest:
        return [f"the sentinel names record {found[0][1][:12]}, {RECORD} is {digest[:12]}: one was changed; run again"]
    if found[0][0] != run_id:
        return [f"the sentinel names run {found[0][0]!r}, {RECORD} is of run {run_id!r}; run again"]
    return []


def verify_run(folder: str | Path) -> list[str]:
    """The five tests: exit code 0, every code cell executed, no error shown, the sentinel, a valid record.

    This checks that a run is whole and unchanged, not that today's code would give the same.

    Args:
        folder: the run's folder, below ``runs/`` or ``book/measured/``.

    Returns:
        What is wrong, one sentence each; empty for a run that counts.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"there is no run {folder.name}; see `ls runs`, or make it with `grass run`"]
    problems, status = _check_status(folder)
    if problems and not (folder / NOTEBOOK).exists():
        return problems  # nothing else can be there
    try:
        cells = json.loads((folder / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
        problems += _check_cells(cells)
        problems += _check_sentinel(cells, folder)
    except FileNotFoundError:
        problems.append(f"{NOTEBOOK} is missing; run again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{NOTEBOOK} is not a readable notebook ({type(error).__name__}); run again")
    try:
        record = load_record(folder / RECORD)
    except RecordError as error:
        problems.append(str(error))
    else:
        if status is not None and (status.run_id, status.experiment, status.scale) != (
            record.run_id,
            record.experiment,
            record.scale,
        ):
            problems.append(f"{STATUS} is of run {status.run_id!r}, {RECORD} of {record.run_id!r}; run again")
    if not problems and status is not None and status.notebook_sha256 != file_sha256(folder / NOTEBOOK):
        problems.append(f"{NOTEBOOK} was changed after the run (its hash is not the one in {STATUS}); run again")
    return problems


def in_one_sentence(problems: Sequence[str]) -> str:
    """What is wrong with a run, with what to do said once.

    Args:
        problems: as `verify_run` gives them.
    """
    again = any(problem.endswith(_AGAIN) for problem in problems)
    return "; ".join(problem.removesuffix(_AGAIN) for problem in problems) + _AGAIN * again


def without_remedy(problem: str) -> str:
    """What is wrong, for whoever is about to run again anyway.

    Args:
        problem: as `verify_run` gives it.
    """
    return problem.removesuffix(_SEE_LOG).removesuffix(_AGAIN)


def unfinished(folder: Path) -> str:
    """Why a run never came to a good end; empty where it is stamped as finished.

    Args:
        folder: the run's folder.
    """
    problems, status = _check_status(folder)
    if status is None and (folder / STATUS).exists():
        return ""  # a stamp that cannot be read is damage
    return in_one_sentence(problems)
