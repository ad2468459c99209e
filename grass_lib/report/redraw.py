"""Tables and figures of stored runs, drawn from their records by this version.

Runs that need a GPU stay in ``book/measured/`` for months, and their notebooks show what the library drew then. What a
cell shows often needs the record alone: such a cell is run again, with the record in the place of the run. A cell that
needs more, or that fails now, keeps its stored outputs.
"""

from __future__ import annotations

import ast
import builtins
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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


def names_of(record: Path) -> dict[str, Any]:
    """What cells may use of a run: ``run.results``, the parameters, the notes, and ``by_hand``, False in a book.

    Args:
        record: Path of the run's record.

    Returns:
        Values by name.
    """
    found = load_record(record)
    run = SimpleNamespace(results=list(found.results))
    return {**found.extra, **found.parameters, "scale": found.scale, "by_hand": False, "run": run}


def from_record(cells: Sequence[Any], record: Path) -> tuple[str, list[int]]:
    """Which cells of an executed notebook need nothing but the record.

    Args:
        cells: Of the notebook.
        record: Path of the run's record.

    Returns:
        The notebook's imports of functions that show things, as code, and the places of the cells.
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
    # A note stands for a variable only where the notebook noted the variable of that name.
    noted = {name for tree in trees.values() for name in _noted(tree)}
    given = set(names_of(record)) - (set(load_record(record).extra) - noted)
    known = given | {alias.asname or alias.name for node in imports for alias in node.names}
    places: list[int] = []
    for place, tree in trees.items():
        assigned = {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        if _PARAMETERS & set(cells[place].metadata.get("tags", [])):
            continue  # the record has their values
        if tree.body and _only_shows(tree, known | assigned | _BUILTINS):
            places.append(place)
            known |= assigned
        else:
            known -= assigned - given  # these have other values from here on
    return "\n".join(ast.unparse(node) for node in imports), places


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
    drawn: list[tuple[Any, Any]] = []
    for copy, (_, record) in zip(copies, runs, strict=True):
        imports, places = from_record(copy.cells, record)
        if not any(copy.cells[place].outputs for place in places):
            continue
        names = f"globals().update(names_of(Path({str(record)!r})))"
        libraries = "from pathlib import Path\nfrom grass_lib.report.redraw import names_of"
        work.append(new_code_cell(f"{libraries}\n{names}\n{imports}"))
        for place in places:
            work.append(new_code_cell(copy.cells[place].source))
            if copy.cells[place].outputs:
                drawn.append((copy.cells[place], work[-1]))
    if not drawn:
        return copies
    logger.info("drawing %d tables and figures of stored runs from their records", len(drawn))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=work, metadata={"kernelspec": kernel})
    try:
        quiet = ["--IPKernelApp.log_level=ERROR"]
        NotebookClient(notebook, timeout=_SECONDS, allow_errors=True, extra_arguments=quiet).execute()
    except (CellTimeoutError, DeadKernelError) as error:
        logger.warning("stored runs are shown as they were drawn then: %s", str(error).strip().splitlines()[0])
        return copies
    for cell, now in drawn:
        failed = next((output for output in now.outputs if output.output_type == "error"), None)
        if failed is not None:
            logger.info("a stored cell stays as it was (%s: %s): %s", failed.ename, failed.evalue, cell.source[:60])
        elif now.outputs:
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


def _noted(tree: ast.Module) -> list[str]:
    """Variables that were noted under their own names: ``run.note("loss", loss)``."""
    return [
        node.args[1].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "note"
        and len(node.args) == 2
        and isinstance(node.args[1], ast.Name)
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == node.args[1].id
    ]


def _only_shows(tree: ast.Module, known: set[str] | frozenset[str]) -> bool:
    """Whether a cell uses these names alone, and of the run nothing but its results."""
    results = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr == "results"
    ]
    return (
        not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree))
        and all(node.id in known for node in _names(tree) if isinstance(node.ctx, ast.Load))
        and all(node in results for node in _names(tree) if node.id == "run")
    )


def _names(tree: ast.Module) -> list[ast.Name]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
