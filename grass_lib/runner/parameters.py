"""The parameters of a notebook: read from its tagged cell, and what users give checked against them."""

from __future__ import annotations

import ast
import difflib
import hashlib
import io
import json
import math
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from grass_lib.errors import GrassError, UsageError

_SCALARS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_EXPECTED = {
    "str": "text",
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
}
#: Set by `grass run` itself.
RESERVED = {"scale": "give it as --scale", "run_id": "the runner makes it from the other parameters"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Attributes:
        name: its name.
        type: ``str``, ``int``, ``float``, ``bool`` or ``list[...]`` of one of these.
        default: its value in the template.
        help: the comment behind it.
    """

    name: str
    type: str
    default: Any
    help: str

    @property
    def item(self) -> str:
        """Type of one value: of the elements for a list."""
        return self.type.removeprefix("list[").removesuffix("]")

    @property
    def is_list(self) -> bool:
        """Whether it takes a list."""
        return self.type.startswith("list[")

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        one = _EXPECTED[self.item]
        return f"a list such as 1,2 or [1, 2], each {one}" if self.is_list else one


def _annotation(node: ast.expr | None, default: Any, where: str) -> str:
    values = default if isinstance(default, list) else [default]
    names = {type(value).__name__ for value in values} or {"str"}
    text = (
        ast.unparse(node).replace(" ", "").lower() if node is not None else "list" if isinstance(default, list) else ""
    )
    inner = re.fullmatch(r"list\[(\w+)\]", text)
    if inner or text == "list":
        item = inner[1] if inner else names.pop()
        kind = f"list[{item}]"
    else:
        item = kind = text or names.pop()
    if item not in _SCALARS:
        raise GrassError(f"{where} has type {text or item!r}, expected str, int, float, bool or a list of one of these")
    return kind


def _comments(source: str) -> dict[int, str]:
    """Comment by line number."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ").strip() for token in tokens if token.type == tokenize.COMMENT}


def read_parameters(template: Path) -> dict[str, Parameter]:
    """Reads ``name: type = default  # help`` from the cell tagged ``parameters``.

    Args:
        template: path of a notebook.

    Returns:
        Parameters by name, in the order of the cell.

    Raises:
        GrassError: no notebook, no such cell or several, or a default that is not a plain value of its type.
    """
    name = f"notebooks/{template.name}"
    try:
        cells = json.loads(template.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        sources = ["".join(cell["source"]) for cell in tagged]
    except FileNotFoundError as error:
        raise GrassError(
            f"{name} is missing; restore it from the repository, or set GRASS_ROOT to the project"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GrassError(f"{name} is not a readable notebook ({type(error).__name__}); restore it") from error
    if len(sources) != 1:
        raise GrassError(f"{name} has {len(sources)} cells tagged 'parameters', expected 1; correct the template")
    try:
        statements, comments = ast.parse(sources[0]).body, _comments(sources[0])
    except (SyntaxError, tokenize.TokenError) as error:
        raise GrassError(
            f"the parameters cell of {name} is not valid Python ({error}); correct the template"
        ) from error
    found: dict[str, Parameter] = {}
    for statement in statements:
        target = statement.target if isinstance(statement, ast.AnnAssign) else None
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
        if not isinstance(target, ast.Name) or not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        where = f"parameter {target.id!r} of {name}"
        try:
            default = ast.literal_eval(statement.value) if statement.value is not None else None
        except ValueError as error:
            raise GrassError(
                f"{where} has a default that is not a plain value; write a number, text or list"
            ) from error
        kind = _annotation(getattr(statement, "annotation", None), default, where)
        text = comments.get(statement.end_lineno or statement.lineno, "")
        parameter = Parameter(target.id, kind, None, text)
        try:
            default = check_value(parameter, default, target.id)
        except UsageError as error:
            raise GrassError(f"{where} has a wrong default: {error}") from error
        found[target.id] = Parameter(target.id, kind, default, text)
    return found


def describe(parameters: Mapping[str, Parameter], experiment: str) -> str:
    """The list of parameters, one a line, as errors and ``--list-parameters`` show it."""
    shown = [item for item in parameters.values() if item.name not in RESERVED]
    width = max((len(f"{item.name}: {item.type} = {item.default!r}") for item in shown), default=0)
    lines = [
        f"  {f'{item.name}: {item.type} = {item.default!r}':<{min(width, 48)}}  {item.help}".rstrip() for item in shown
    ]
    return "\n".join([f"Parameters of {experiment}:", *lines])


def _scalar_from_text(item: str, text: str) -> Any:
    """A value from what was typed; ValueError where it is not one."""
    if item == "bool":
        if text.strip().lower() not in _WORDS:
            raise ValueError(text)
        return _WORDS[text.strip().lower()]
    return text if item == "str" else _SCALARS[item](text)


def from_text(parameter: Parameter, text: str) -> Any:
    """The value that was typed for a parameter.

    Args:
        parameter: which one.
        text: what stands behind ``name=``. Lists are written ``1,2`` or as JSON.

    Returns:
        The value in the parameter's type.

    Raises:
        UsageError: the text is not of that type.
    """
    problem = f"parameter {parameter.name!r} is {text!r}, expected {parameter.expected} ({parameter.type})"
    try:
        if not parameter.is_list:
            return check_value(parameter, _scalar_from_text(parameter.item, text), repr(text))
        if text.strip().startswith("["):
            return check_value(parameter, json.loads(text), repr(text))
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return check_value(parameter, [_scalar_from_text(parameter.item, part) for part in parts], repr(text))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(problem) from error


def _check_scalar(item: str, value: Any) -> Any:
    if item == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not _SCALARS[item] or (item == "float" and not math.isfinite(value)):
        raise ValueError(value)
    return value


def _leaves(text: str) -> bool:
    """Whether text could name a file outside the run's folder."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    absolute = (
        text.startswith(("/", "\\", "~")) or PureWindowsPath(text).is_absolute() or text.lower().startswith("file:")
    )
    return absolute or ".." in parts


def check_value(parameter: Parameter, value: Any, shown: str | None = None) -> Any:
    """Checks a Python value against a parameter.

    Args:
        parameter: which one.
        value: the value.
        shown: how messages show it; None means its ``repr``.

    Returns:
        The value; a whole number for a ``float`` becomes one.

    Raises:
        UsageError: another type, a number that is not finite, control characters, or a path out of the run's folder.
    """
    shown = repr(value) if shown is None else shown
    try:
        if parameter.is_list:
            if not isinstance(value, list | tuple):
                raise ValueError(value)
            value = [_check_scalar(parameter.item, item) for item in value]
        else:
            value = _check_scalar(parameter.item, value)
    except ValueError as error:
        raise UsageError(
            f"parameter {parameter.name!r} is {shown}, expected {parameter.expected} ({parameter.type})"
        ) from error
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isprintable():
            raise UsageError(
                f"parameter {parameter.name!r} is {shown}, expected text without line breaks or control characters"
            )
        if isinstance(text, str) and _leaves(text):
            raise UsageError(
                f"parameter {parameter.name!r} is {shown}, expected no path that leaves the run's folder; "
                "take out '..', '~' and the leading '/'"
            )
    return value


def split_assignments(texts: Iterable[str]) -> dict[str, str]:
    """Takes ``name=value`` apart.

    Args:
        texts: what stood behind each ``-p``.

    Returns:
        Text by name.

    Raises:
        UsageError: no ``=``, a name that Python would not take, or one name with two values.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"-p {text!r} is not a parameter, expected name=value such as -p seed=1")
        name = name.strip()
        if found.get(name, value) != value:
            raise UsageError(f"parameter {name!r} is given twice, as {found[name]!r} and {value!r}; give it once")
        found[name] = value
    return found


def resolve(
    parameters: Mapping[str, Parameter], given: Mapping[str, Any], *, experiment: str, typed: bool = False
) -> dict[str, Any]:
    """All parameters of a notebook with the given ones put in.

    Args:
        parameters: those of the template.
        given: values by name, as text (from a command line) or as Python values.
        experiment: whose they are, for messages.
        typed: whether text values are values of their own, not something to parse.

    Returns:
        Value by name, in the template's order, without ``scale`` and ``run_id``.

    Raises:
        UsageError: an unknown name, a wrong type, or a name that `grass run` sets itself; the message ends with
            the list.
    """
    listing = describe(parameters, experiment)
    values = {name: item.default for name, item in parameters.items() if name not in RESERVED}
    for name, value in given.items():
        if name in RESERVED:
            raise UsageError(f"parameter {name!r} cannot be set with -p; {RESERVED[name]}\n{listing}")
        if name not in parameters:
            near = difflib.get_close_matches(name, values, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; choose one of these"
            raise UsageError(f"{experiment} has no parameter {name!r}{hint}\n{listing}")
        try:
            parsed = isinstance(value, str) and not typed
            values[name] = from_text(parameters[name], value) if parsed else check_value(parameters[name], value)
        except UsageError as error:
            raise UsageError(f"{error}\n{listing}") from error
    return values


def parameter_hash(values: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a set of parameters."""
    text = json.dumps(dict(values), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]
