"""What a job asks of the cluster: ``slurm.toml``, ``--slurm NAME=VALUE``, checked before anything is submitted.

The file lies in the project's root, or where ``GRASS_SLURM`` says::

    partition = "gpu"                       # for all jobs
    account = "my_account"
    setup = ["module load cuda/12.4"]       # lines of shell that run first on the node
    sbatch = {exclude = "node13"}           # any other option of sbatch

    [paper]                                 # for one scale
    time = "8:00:00"

    [mlp_mnist]                             # for one experiment
    cpus = 4

    [mlp_mnist.paper]                       # for one experiment at one scale
    gpus = "a100:1"

The more particular table wins, the command line wins over all; ``setup`` and ``sbatch`` add up instead.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grass_lib.errors import UsageError

FILE = "slurm.toml"
SCALES = ("embedded", "paper")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "embedded": {"time": "1:00:00", "gpus": 0, "cpus": 2, "memory": "8G"},
    "paper": {"time": "4:00:00", "gpus": 1, "cpus": 8, "memory": "64G"},
}
# Options of sbatch that have a name here, or that this package and submitit set themselves.
_NAMED = {"time": "time", "partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint"} | {
    "mem": "memory", "cpus-per-task": "cpus", "gpus": "gpus", "gpus-per-node": "gpus",
}  # fmt: skip
_OWN = ("array", "dependency", "error", "job-name", "nodes", "ntasks", "open-mode", "output", "signal", "wrap")


@dataclass(frozen=True)
class Resources:
    """What one job asks for.

    Attributes:
        partition: Where to run; None leaves it to the cluster, as for the next three.
        account: Who pays.
        qos: Quality of service.
        constraint: Features that a node must have.
        minutes: Time limit in minutes; a job that reaches it is queued again and goes on.
        gpus: Number of GPUs, with a type where wanted (``a100:2``); ``0`` for none.
        cpus: Cores.
        memory: Main memory, such as ``64G``; ``0`` for all of the node.
        parallel: How many jobs of an array run at a time; None for no limit.
        requeues: How often a job may reach its time limit and still be queued again; pre-emption does not count.
        setup: Lines of shell that run on the node before the job.
        sbatch: Further options of ``sbatch``, by name; a switch has the value ``""``.
    """

    minutes: int
    gpus: str
    cpus: int
    memory: str
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    parallel: int | None = None
    requeues: int = 10
    setup: tuple[str, ...] = ()
    sbatch: tuple[tuple[str, str], ...] = ()

    def shown(self) -> str:
        """What is asked for, in one line."""
        words = [f"{name}={value}" for name in _PLACES if (value := getattr(self, name)) is not None]
        limit = f"{self.minutes // 60}:{self.minutes % 60:02d}:00"
        words += [f"time={limit}", f"gpus={self.gpus}", f"cpus={self.cpus}", f"memory={self.memory}"]
        return ", ".join([*words, *(f"{name}={value}" for name, value in self.sbatch)])

    def to_json(self) -> dict[str, Any]:
        """For the record of a submission."""
        return asdict(self)


_PLACES = ("partition", "account", "qos", "constraint")


@dataclass(frozen=True)
class Settings:
    """Everything that was asked for, layer by layer.

    Attributes:
        layers: Values by name, by whom they are for (``""``, a scale, an experiment, ``experiment.scale``).
        typed: Values of the command line.
    """

    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    typed: Mapping[str, Any] = field(default_factory=dict)

    def resources(self, experiment: str, scale: str) -> Resources:
        """What a job of one experiment at one scale asks for."""
        places = ("", scale, experiment, f"{experiment}.{scale}")
        values: dict[str, Any] = {name: _READ[name](value) for name, value in _DEFAULTS[scale].items()}
        for layer in (*(self.layers.get(place, {}) for place in places), self.typed):
            for name, value in layer.items():
                if name == "setup":
                    value = (*values.get(name, ()), *value)
                elif name == "sbatch":
                    value = tuple((dict(values.get(name, ())) | dict(value)).items())
                values[name] = value
        values["minutes"] = values.pop("time")
        return Resources(**values)


def load_settings(root: Path, typed: Sequence[str] = (), experiments: Iterable[str] = ()) -> Settings:
    """Reads the file, if there is one, and the command line.

    Args:
        root: The project's root, where ``slurm.toml`` may be.
        typed: What stood behind each ``--slurm``.
        experiments: Keys of all experiments.

    Raises:
        UsageError: A name, value or table that means nothing.
    """
    named = os.environ.get("GRASS_SLURM")
    path = Path(named).expanduser() if named else root / FILE
    if named and not path.is_file():
        raise UsageError(f"GRASS_SLURM is {named!r}, which is not a file; name a file such as {FILE}, or unset it")
    layers = _read_file(path, list(experiments)) if path.is_file() else {}
    return Settings(layers, _read_typed(typed))


def _read_file(path: Path, experiments: list[str]) -> dict[str, dict[str, Any]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}; correct it, or move it away") from error
    layers: dict[str, dict[str, Any]] = {}

    def take(table: Mapping[str, Any], place: str, deeper: Sequence[str]) -> None:
        values = layers.setdefault(place, {})
        for name, value in table.items():
            where = f"{path.name}, {f'table [{place}], ' if place else ''}{name}"
            if isinstance(value, dict) and name != "sbatch":
                if name not in deeper:
                    expected = f"one of {', '.join(deeper)}" if deeper else "no table inside this one"
                    raise UsageError(f"{where}: a table of that name means nothing, expected {expected}")
                take(value, f"{place}.{name}".strip("."), SCALES if not place and name not in SCALES else ())
            else:
                values[name] = _value(name, value, where)

    take(content, "", [*SCALES, *experiments])
    return layers


def _read_typed(typed: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in typed:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--slurm {text!r} is no setting, expected NAME=VALUE such as --slurm partition=gpu")
        where = f"--slurm {name}"
        if name == "setup":
            values[name] = (*values.get(name, ()), *_value(name, [value], where))
        elif name.startswith("sbatch."):
            given = _value("sbatch", {name.removeprefix("sbatch."): value}, where)
            values["sbatch"] = (*values.get("sbatch", ()), *given)
        elif name in values:
            raise UsageError(f"{where} is given twice; give it once")
        else:
            values[name] = _value(name, value, where)
    return values


def _value(name: str, value: Any, where: str) -> Any:
    if name not in _READ:
        near = difflib.get_close_matches(name, _READ, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "other options of sbatch go to 'sbatch'"
        raise UsageError(f"{where}: there is no setting {name!r}, expected one of {', '.join(_READ)}; {hint}")
    try:
        return _READ[name](value)
    except ValueError as error:
        raise UsageError(f"{where} is {value!r}, {error}") from error


def _word(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[^\s'\"]+", value):
        raise ValueError("expected a word without spaces and quotes")
    return value


def _count(lowest: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)) or int(value) < lowest:
            raise ValueError(f"expected a whole number >= {lowest}")
        return int(value)

    return read


def _minutes(value: Any) -> int:
    """Minutes, rounded up. ``4:00`` is refused: it reads like hours, and Slurm takes it for minutes."""
    text = str(value)
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", text)
    if match:
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        found = (days * 24 + hours) * 60 + minutes + math.ceil(seconds / 60)
    elif re.fullmatch(r"\d+", text) and not isinstance(value, bool):
        found = int(text)
    else:
        raise ValueError("expected hours:minutes:seconds such as 4:00:00 (2-12:00:00 with days), or minutes")
    if found < 1:
        raise ValueError("expected at least a minute")
    return found


def _gpus(value: Any) -> str:
    if isinstance(value, bool) or not re.fullmatch(r"(?:[A-Za-z][\w.-]*:)?\d+", str(value)):
        raise ValueError("expected a number, with a type where wanted, such as 1 or a100:2")
    return "0" if str(value).rpartition(":")[2].strip("0") == "" else str(value)


def _memory(value: Any) -> str:
    if isinstance(value, bool) or not re.fullmatch(r"0|[1-9]\d*[MGT]", str(value)):
        raise ValueError("expected a number with M, G or T, such as 64G (0 for all of the node)")
    return str(value)


def _setup(value: Any) -> tuple[str, ...]:
    lines = list(value) if isinstance(value, list) else [value]
    for line in lines:
        if not isinstance(line, str) or not line.isprintable() or not line.strip():
            raise ValueError("expected lines of shell, each a text of its own")
        if line.lstrip().startswith("#SBATCH"):
            raise ValueError("options of sbatch are no lines of shell; give them as settings, or under 'sbatch'")
    return tuple(lines)


def _sbatch(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise ValueError('expected a table such as {exclude = "node13"} (sbatch.exclude=node13 on the command line)')
    found = {}
    for key, item in value.items():
        name = key.removeprefix("--").replace("_", "-")
        if name in ("requeue", "no-requeue"):
            raise ValueError("jobs are always queued again after pre-emption; see the setting 'requeues'")
        if name in _NAMED:
            raise ValueError(f"the option {name!r} has a setting of its own; give {_NAMED[name]!r}")
        if name in _OWN:
            raise ValueError(f"the option {name!r} is set by `grass` itself; leave it out")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or not isinstance(item, str | int) or item is False:
            raise ValueError(f"option {key!r} cannot be given so; expected a long option of sbatch and its value")
        if not str(item).isprintable():
            raise ValueError(f"the value of {key!r} has characters that cannot be printed")
        found[name] = "" if item is True else str(item)
    return tuple(found.items())


_READ: Mapping[str, Callable[[Any], Any]] = {
    "partition": _word, "account": _word, "qos": _word, "constraint": _word, "time": _minutes, "gpus": _gpus,
    "cpus": _count(1), "memory": _memory, "parallel": _count(1), "requeues": _count(0), "setup": _setup,
    "sbatch": _sbatch,
}  # fmt: skip
