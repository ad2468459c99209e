"""The run record: what one run says about itself, as one JSON file that is checked whenever it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from grass_lib.errors import RecordError
from grass_lib.report.scrub import has_absolute_path

SCHEMA_VERSION = 1
DATA_KINDS = ("official", "recompressed", "subset", "substitute", "embedded")
CONVENTIONS = ("relative", "paper")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEX = re.compile(r"[0-9a-f]{64}")


def is_run_id(text: object) -> bool:
    """Whether a value may name a run: letters, digits, ``.``, ``_`` and ``-``, and never a path."""
    return isinstance(text, str) and bool(_RUN_ID.fullmatch(text)) and ".." not in text


@dataclass(frozen=True)
class RunRecord:
    """One run of one notebook (schema version 1). Seconds are wall-clock seconds, sizes are bytes.

    Attributes:
        schema_version: version of this schema.
        run_id: name of the run.
        experiment: key of the experiment, such as ``mlp_mnist``.
        scale: ``embedded`` or ``paper``.
        status: ``complete``; a run that did not end well writes no record.
        data: ``source``, ``rows``, ``sha256`` and ``kind`` (one of `DATA_KINDS`).
        parameters: all parameters of the notebook.
        results: one dictionary per attributor, compression and damping convention; `Run.result` says what is in it.
        phases: seconds by name of the phase.
        phase_peak_bytes: peak memory of the device by name of the phase.
        peak_bytes: peak memory of the device: allocated by torch on a GPU, resident on a CPU.
        stored_bytes: size of the run's ``store/``.
        tokens_per_second: throughput, null where tokens mean nothing.
        device: ``type``, ``name``, ``memory_bytes``, ``driver`` and more.
        versions: version by package.
        source_hash: SHA-256 over the package and the template.
        modules: SHA-256 of the source of each module that the experiment declares.
        git_commit: commit of the checkout, null outside of one.
        started: ISO 8601 with time zone.
        finished: ISO 8601 with time zone.
        extra: anything else, by name.
    """

    run_id: str
    experiment: str
    scale: str
    data: dict[str, Any]
    parameters: dict[str, Any]
    results: list[dict[str, Any]]
    phases: dict[str, float]
    peak_bytes: int
    stored_bytes: int
    tokens_per_second: float | None
    device: dict[str, Any]
    versions: dict[str, str]
    source_hash: str
    modules: dict[str, str]
    git_commit: str | None
    started: str
    finished: str
    schema_version: int = SCHEMA_VERSION
    status: str = "complete"
    phase_peak_bytes: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, check, expected in _RULES:
            _require(check(getattr(self, name)), name, getattr(self, name), expected)
        for name in ("source", "rows", "sha256", "kind"):
            _require(name in self.data, f"data.{name}", None, "a value")
        _require(self.data["kind"] in DATA_KINDS, "data.kind", self.data["kind"], f"one of {', '.join(DATA_KINDS)}")
        for place, row in enumerate(self.results):
            check_row(row, f"results[{place}]")
        started, finished = datetime.fromisoformat(self.started), datetime.fromisoformat(self.finished)
        _require(started <= finished, "finished", self.finished, f"not before started ({self.started})")
        for name, value in _strings(asdict(self), ""):
            _require(not has_absolute_path(value), name, value, "no absolute path of a machine")

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


def _require(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        shown = repr(value)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        raise RecordError(f"run record: {name} is {shown}, expected {expected}; run the notebook again")


def _strings(value: Any, name: str) -> list[tuple[str, str]]:
    """Every string of a JSON value with its place."""
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _strings(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [found for place, item in enumerate(value) for found in _strings(item, f"{name}[{place}]")]
    return []


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value >= 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _mapping_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_text(key) and check(item) for key, item in value.items())


def _time(value: Any) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


def _anything(_: Any) -> bool:
    return True


_TIME = "a time in ISO 8601 with a time zone"
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("schema_version", lambda value: value == SCHEMA_VERSION and _count(value), str(SCHEMA_VERSION)),
    ("run_id", is_run_id, "letters, digits, '.', '_' and '-' only"),
    ("experiment", _text, "the key of an experiment"),
    ("scale", lambda value: value in ("embedded", "paper"), "'embedded' or 'paper'"),
    ("status", lambda value: value == "complete", "'complete'"),
    ("data", _mapping_of(_anything), "an object with source, rows, sha256 and kind"),
    ("parameters", _mapping_of(_anything), "an object"),
    (
        "results",
        lambda value: isinstance(value, list) and all(isinstance(row, dict) for row in value),
        "a list of objects",
    ),
    ("phases", _mapping_of(_positive), "seconds >= 0 by name"),
    ("phase_peak_bytes", _mapping_of(_count), "bytes by name"),
    ("peak_bytes", _count, "a number of bytes"),
    ("stored_bytes", _count, "a number of bytes"),
    ("tokens_per_second", _optional(_positive), "a number or null"),
    ("device", lambda value: isinstance(value, dict) and _text(value.get("type")), "an object with type"),
    ("versions", _mapping_of(_text), "text by package"),
    ("source_hash", lambda value: isinstance(value, str) and bool(_HEX.fullmatch(value)), "64 hexadecimal digits"),
    ("modules", _mapping_of(lambda value: isinstance(value, str) and bool(_HEX.fullmatch(value))), "SHA-256 by module"),
    ("git_commit", _optional(_text), "a commit or null"),
    ("started", _time, _TIME),
    ("finished", _time, _TIME),
    ("extra", _mapping_of(_anything), "an object"),
)

_ROW_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("attributor", _text, "a name such as 'trak'"),
    ("sparsification", _text, "a spec such as 'identity'"),
    ("projection", _text, "a spec such as 'sjlt-4096'"),
    ("spec", _text, "the canonical spec"),
    ("k", _optional(_count), "a dimension or null"),
    ("lds", _optional(lambda value: isinstance(value, dict)), "an object or null"),
    ("noise_ceiling", _optional(lambda value: isinstance(value, dict)), "an object or null"),
    ("damping", _optional(_positive), "a number or null"),
    ("damping_convention", lambda value: value is None or value in CONVENTIONS, "'relative', 'paper' or null"),
    ("projection_seconds", _optional(_positive), "seconds or null"),
    ("backend", _optional(_text), "a name or null"),
    ("operator", _optional(_text), "a name or null"),
)
# Fields that only some attributors have, checked where they are.
_OPTIONAL_ROW_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("seconds", _optional(_mapping_of(_positive)), "seconds >= 0 by name of the phase, or null"),
    ("k_total", _optional(_count), "the sum of k over the layers"),
    ("layers", _optional(_count), "a number of layers"),
    ("head_included", lambda value: value is None or isinstance(value, bool), "true or false"),
    ("tokens_per_second", _optional(_positive), "a number or null"),
    ("stored_bytes", _optional(_count), "a number of bytes"),
)
_LDS_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("mean", lambda value: _number(value) and -1 <= value <= 1, "a correlation between -1 and 1"),
    ("interval", _optional(_interval), "[low, high] or null"),
    ("n_models", _count, "a number of models"),
    ("n_queries", _count, "a number of queries"),
    ("n_undefined", _count, "a number of queries"),
)


def check_row(row: Mapping[str, Any], place: str = "result") -> None:
    """Checks one result row.

    Args:
        row: the row.
        place: what the message calls it.

    Raises:
        RecordError: a field is missing or wrong; the message names it, its value and what was expected.
    """
    for name, check, expected in _ROW_RULES:
        _require(name in row and check(row[name]), f"{place}.{name}", row.get(name), expected)
    for name, check, expected in _OPTIONAL_ROW_RULES:
        _require(name not in row or check(row[name]), f"{place}.{name}", row.get(name), expected)
    lds, ceiling = row["lds"], row["noise_ceiling"]
    if lds is not None:
        for name, check, expected in _LDS_RULES:
            _require(name in lds and check(lds[name]), f"{place}.lds.{name}", lds.get(name), expected)
    if ceiling is not None:
        for name, check, expected in _LDS_RULES[:2]:
            _require(
                name in ceiling and check(ceiling[name]), f"{place}.noise_ceiling.{name}", ceiling.get(name), expected
            )


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def parse_record(text: str) -> RunRecord:
    """Reads a record from JSON text.

    Args:
        text: content of a ``record.json``.

    Returns:
        The checked record.

    Raises:
        RecordError: the text is not JSON, or a field is missing, unknown or wrong.
    """
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except ValueError as error:
        raise RecordError(f"run record: not readable as JSON ({error}); run the notebook again") from error
    _require(isinstance(value, dict), "content", value, "a JSON object")
    known = {item.name for item in fields(RunRecord)}
    _require("schema_version" in value, "schema_version", None, str(SCHEMA_VERSION))
    _require(value["schema_version"] == SCHEMA_VERSION, "schema_version", value["schema_version"], str(SCHEMA_VERSION))
    for name in sorted(known - value.keys()):
        _require(False, name, None, "a value")
    for name in sorted(value.keys() - known):
        _require(False, name, value[name], "no such field in schema version 1")
    return RunRecord(**value)


def load_record(path: str | Path) -> RunRecord:
    """Reads and checks a ``record.json``.

    Args:
        path: path of the file.

    Returns:
        The record.

    Raises:
        RecordError: the file is missing, is not JSON, or a field is missing or wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise RecordError(f"{'/'.join(path.parts[-2:])} cannot be read ({reason}); run the notebook again") from error
    try:
        return parse_record(text)
    except RecordError as error:
        raise RecordError(f"{'/'.join(path.parts[-2:])}: {error}") from error
