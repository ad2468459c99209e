"""Tables and figures of stored runs, drawn from their records by this version.

Runs that need a GPU stay in ``book/measured/`` for months, and their notebooks show what the library drew then. What a
cell shows often needs the record alone: such a cell is run again, with the record in the place of the run. A cell that
needs more, or that fails now, keeps its stored outputs.
"""

from __future__ import annotations

import ast
import builtins
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

from grass_lib.report.record import load_record

if TYPE_CHECKING:
    from nbformat import NotebookNode

logger = logging.getLogger(__name__)
_SHOWING = ("grass_lib.report.", "IPython.display")
_FORBIDDEN = {
    "open",
    "exec",
    "eval",
    "compile",
    "input",
    "globals",
    "locals",
    "vars",
    "setattr",
    "delattr",
    "__import__",
}
_BUILTINS = frozenset(dir(builtins)) - _FORBIDDEN
_PARAMETERS = {"parameters", "injected-parameters"}
_SECONDS = 120  # for one cell


def names_of(record: Path, noted: Mapping[str, str]) -> dict[str, Any]:
    """What cells may use of a run: ``run.results``, the parameters, what was noted, and ``by_hand``, False in a book.

    Args:
        record: Path of the run's record.
        noted: Which note holds which variable, or attribute of a variable: ``{"gains": "gains", "found.checks":
            "checks"}``.

    Returns:
        Values by name.
    """
    found = load_record(record)
    names: dict[str, Any] = {}
    for expression, note in noted.items():
        name, _, attribute = expression.partition(".")
        if attribute:
            setattr(names.setdefault(name, SimpleNamespace()), attribute, found.extra[note])
        else:
            names[name] = found.extra[note]
    run = SimpleNamespace(results=list(found.results))
    return {**names, **found.parameters, "scale": found.scale, "by_hand": False, "run": run}


@dataclass(frozen=True)
class FromRecord:
    """Cells of an executed notebook that need nothing but the record.

    Attributes:
        places: Of the cells.
        imports: The notebook's imports of functions that show things, as code.
        noted: As for `names_of`.
    """

    places: list[int]
    imports: str
    noted: dict[str, str]


def from_record(cells: Sequence[Any], record: Path) -> FromRecord:
    """Finds the cells that show what is in the record.

    Args:
        cells: Of the notebook.
        record: Path of the run's record.
    """
    trees = {place: _parsed(cell.source) for place, cell in enumerate(cells) if cell.cell_type == "code"}
    imports = [
        node
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and f"{node.module}.".startswith(_SHOWING)
        and not any(alias.name == "Run" for alias in node.names)
    ]
    notes = load_record(record).extra
    noted = {
        expression: note
        for tree in trees.values()
        for expression, note in _noted(tree).items()
        if note in notes and expression.partition(".")[0] != "run"
    }
    given = set(names_of(record, noted))
    stand_ins = {"run", "by_hand", *(expression.partition(".")[0] for expression in noted)}
    known = given | {alias.asname or alias.name for node in imports for alias in node.names}
    places: list[int] = []
    for place, tree in trees.items():
        if _PARAMETERS & set(cells[place].metadata.get("tags", [])):
            continue  # the record has their values
        assigned = {node.id for node in _names(tree) if isinstance(node.ctx, ast.Store)}
        if tree.body and _only_shows(tree, known | assigned | _BUILTINS, {"run.results", *noted}):
            places.append(place)
            known |= assigned
        else:
            known -= assigned - stand_ins  # these have other values from here on
    return FromRecord(places, "\n".join(ast.unparse(node) for node in imports), noted)


def redraw(runs: Sequence[tuple[NotebookNode, Path]]) -> list[NotebookNode]:
    """Copies of executed notebooks whose cells that need only the record show what this version makes of it.

    One kernel runs them all.

    Args:
        runs: Each executed notebook, and the path of its record.

    Returns:
        In the same order.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from nbformat.v4 import new_code_cell, new_notebook

    copies: list[Any] = [nbformat.from_dict(notebook) for notebook, _ in runs]
    work: list[Any] = []
    drawn: list[list[tuple[Any, Any]]] = []
    for copy, (_, record) in zip(copies, runs, strict=True):
        shown = from_record(copy.cells, record)
        if not any(copy.cells[place].outputs for place in shown.places):
            continue
        names = f"globals().update(names_of(Path({str(record)!r}), {shown.noted!r}))"
        libraries = "from pathlib import Path\nfrom grass_lib.report.redraw import names_of"
        # Nothing of the notebook before is there any more.
        work.append(new_code_cell("get_ipython().run_line_magic('reset', '-f')"))
        work.append(new_code_cell(f"{libraries}\n{names}\n{shown.imports}"))
        drawn.append([(new_code_cell(), work[-1])])
        for place in shown.places:
            work.append(new_code_cell(copy.cells[place].source))
            drawn[-1].append((copy.cells[place], work[-1]))
    if not drawn:
        return copies
    logger.info("drawing tables and figures of %d stored runs from their records", len(drawn))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=work, metadata={"kernelspec": kernel})
    try:
        quiet = ["--IPKernelApp.log_level=ERROR"]
        NotebookClient(notebook, timeout=_SECONDS, allow_errors=True, extra_arguments=quiet).execute()
    except (CellTimeoutError, DeadKernelError) as error:
        logger.warning("stored runs are shown as they were drawn then: %s", str(error).strip().splitlines()[0])
        return copies
    for pairs in drawn:
        for cell, now in pairs:
            failed = next((output for output in now.outputs if output.output_type == "error"), None)
            if failed is not None:
                # What comes after it may use what it did not get to.
                logger.info("a stored cell stays as it was (%s: %s): %s", failed.ename, failed.evalue, cell.source[:60])
                break
            if cell.get("outputs") and now.outputs:
                cell.outputs = now.outputs
                for output in cell.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count = cell.execution_count
    return copies


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # a magic of IPython: such a cell is never run again
        return ast.Module(body=[], type_ignores=[])


def _noted(tree: ast.Module) -> dict[str, str]:
    """Notes of variables and of their attributes: ``run.note("loss", loss)``, ``run.note("facts", found.facts)``."""
    return {
        ast.unparse(node.args[1]): str(node.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "note"
        and len(node.args) == 2
        and isinstance(node.args[0], ast.Constant)
        and (isinstance(node.args[1], ast.Name) or _is_attribute(node.args[1]))
    }


def _is_attribute(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether it is an attribute of a variable, without more between them."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def _only_shows(tree: ast.Module, known: set[str] | frozenset[str], attributes: set[str]) -> bool:
    """Whether a cell uses these names alone, and of objects that stand for others nothing but these attributes."""
    stand_ins = {expression.partition(".")[0] for expression in attributes if "." in expression}
    allowed = {id(node.value) for node in ast.walk(tree) if _is_attribute(node) and ast.unparse(node) in attributes}
    return (
        not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
        and all(node.id in known for node in _names(tree) if isinstance(node.ctx, ast.Load))
        and all(id(node) in allowed for node in _names(tree) if node.id in stand_ins)
    )


def _names(tree: ast.Module) -> list[ast.Name]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
