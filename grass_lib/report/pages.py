"""From a verified run to a page of the book: the executed notebook, inputs folded, or a stub where there is no run."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.report.pairs import PAIRS
from grass_lib.report.style import experiment_title

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from grass_lib.report.record import RunRecord

#: What the data of a run were, in words.
DATA_KINDS = {
    "official": "the official files",
    "recompressed": "the official samples, recompressed",
    "subset": "a part of the official data",
    "substitute": "substitute data",
    "embedded": "the small data set that comes with an installed package",
}
_TITLE = re.compile(r"^#\s+(.+?)\s*$", re.MULTILINE)
_SECTION = re.compile(r"^##+\s+(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page of the book that shows a run.

    Attributes:
        experiment: name of the model and data pair.
        scale: ``embedded`` or ``paper``.
    """

    experiment: str
    scale: str

    @property
    def stem(self) -> str:
        """File name without suffix."""
        return f"{self.experiment}_{self.scale}"

    @property
    def title(self) -> str:
        """Title shown to readers."""
        return f"{experiment_title(self.experiment)}, {self.scale} scale"

    @property
    def command(self) -> str:
        """The command that makes the run."""
        return f"grass run {self.experiment} --scale {self.scale}"


def pages_in_toc(toc: Path) -> list[Page]:
    """Pages below ``book/executed/`` that the table of contents names.

    Args:
        toc: path of ``_toc.yml``.

    Returns:
        The pages in the order of the book.
    """
    import yaml

    found: list[Page] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            name = node.get("file", "")
            if isinstance(name, str) and name.startswith("book/executed/"):
                experiment, _, scale = name.removeprefix("book/executed/").rpartition("_")
                found.append(Page(experiment, scale))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(yaml.safe_load(toc.read_text(encoding="utf-8")))
    return found


def duration(seconds: float) -> str:
    """A duration in words: ``41 s``, ``2 min 5 s``, ``1 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def changed_parameters(folder: Path) -> list[str]:
    """Names of the parameters of a run that differ from the notebook's own values, as its stamp says.

    Args:
        folder: the run's folder.

    Returns:
        The names; none where there is no stamp.
    """
    path = folder / "status.json"
    return list(json.loads(path.read_text(encoding="utf-8")).get("changed") or []) if path.is_file() else []


def other_runs_text(others: Iterable[tuple[str, str]]) -> str:
    """Stored runs of a pair beside the one that its page shows, to be downloaded.

    Args:
        others: What each was changed in, and the stem of its files.

    Returns:
        MyST Markdown; empty without any.
    """
    found = [
        f"`{changed}` ({{download}}`notebook <../_generated/notebooks/{stem}.ipynb>`, "
        f"{{download}}`record <../_generated/records/{stem}.json>`)"
        for changed, stem in others
    ]
    return f"Other stored runs: {'; '.join(found)}." if found else ""


_ON_THE_SAME = (
    ", with `GRASS_DATA` naming a folder that holds just this part of the data; without it the run takes all of them, "
    "and trains other models"
)


def provenance(
    record: RunRecord,
    page: Page,
    changed: Sequence[str] = (),
    others: Iterable[tuple[str, str]] = (),
    *,
    redrawn: bool = False,
) -> str:
    """A box in MyST that says where the numbers of a page come from.

    Args:
        record: the run's record.
        page: the page that shows it.
        changed: parameters that differ from the notebook's own values.
        others: other stored runs, as for `other_runs_text`.
        redrawn: whether what needs only the record was drawn anew.

    Returns:
        MyST Markdown.
    """
    device, versions, data = record.device, record.versions, record.data
    name = device.get("name") or device.get("type") or "unknown device"
    seconds = sum(float(value) for value in record.phases.values())
    kind = DATA_KINDS.get(str(data.get("kind")), str(data.get("kind")))
    rows = f", {int(data['rows']):,} rows" if data.get("rows") else ""
    lines = [
        ":::{admonition} Where these numbers come from",
        ":class: note provenance",
        f"Run `{record.run_id}`, finished {str(record.finished)[:16].replace('T', ' ')} on {name}, "
        f"{duration(seconds)} in the phases of its last attempt, which takes networks, masks and stores that are there "
        "already; "
        f"Python {versions.get('python', '?')}, PyTorch {versions.get('torch', '?')}.",
        f"Data: {kind} ({html.escape(str(data.get('source', 'unnamed source')), quote=False)}{rows}).",
    ]
    if page.scale == "embedded":
        lines.append("These sizes are the embedded scale's, not the paper's: compare methods here, not with the paper.")
    elif any(pair.name == page.experiment for pair in PAIRS):
        lines.append("What differs from the paper, and what its figures mean, is on {doc}`../pairs`.")
    if changed:
        values = ", ".join(f"`{name} = {record.parameters.get(name)!r}`" for name in changed)
        lines.append(f"Parameters that were changed for this run: {values}.")
    if redrawn:
        lines.append(
            "Tables and figures that need the record alone are drawn from it by this version; the executed notebook "
            "shows them as they were drawn then."
        )
    again = "".join(f" -p {shlex.quote(f'{name}={record.parameters.get(name)}')}" for name in changed)
    lines += [
        "",
        f"Get the {{download}}`run record <../_generated/records/{page.stem}.json>` or the "
        f"{{download}}`executed notebook <../_generated/notebooks/{page.stem}.ipynb>`, "
        f"or make the run again: `{page.command}{again}`{_ON_THE_SAME if data.get('kind') == 'subset' else ''}.",
    ]
    beside = other_runs_text(others)
    lines += ["", beside, ":::"] if beside else [":::"]
    return "\n".join(lines)


def to_page(
    notebook: NotebookNode,
    record: RunRecord,
    page: Page,
    changed: Sequence[str] = (),
    others: Iterable[tuple[str, str]] = (),
    *,
    redrawn: bool = False,
) -> NotebookNode:
    """A copy of an executed notebook made ready for the book; the outputs are left as they are.

    Code is folded behind a click, the title names the scale, a box under it says where the numbers come from, and
    metadata of the execution (paths, clock times) is dropped.

    Args:
        notebook: the executed notebook.
        record: its run record.
        page: where it goes.
        changed: parameters that differ from the notebook's own values.
        others: other stored runs, as for `other_runs_text`.
        redrawn: whether what needs only the record was drawn anew, see `grass_lib.report.redraw`.

    Returns:
        A new notebook.
    """
    import nbformat
    from nbformat.v4 import new_markdown_cell

    copy: Any = nbformat.from_dict(notebook)
    copy.metadata.pop("papermill", None)
    position, section = 0, page.title
    for index, cell in enumerate(copy.cells):
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            tags = set(cell.metadata.get("tags", []))
            if not tags & {"hide-input", "hide-cell", "remove-input", "remove-cell"}:
                tags.add("hide-input")
            cell.metadata["tags"] = sorted(tags)
            cell.metadata["mystnb"] = {"image": {"alt": f"Figure of the section {section}"}}
        elif cell.cell_type == "markdown" and not position and _TITLE.search(cell.source):
            cell.source = _TITLE.sub(f"# {page.title}", cell.source, count=1)
            position = index + 1
        if cell.cell_type == "markdown" and (heading := _SECTION.search(cell.source)):
            section = heading[1].rstrip("?.")
    if not position:
        copy.cells.insert(0, new_markdown_cell(f"# {page.title}", id="page-title"))
        position = 1
    copy.cells.insert(
        position, new_markdown_cell(provenance(record, page, changed, others, redrawn=redrawn), id="page-provenance")
    )
    return copy


_MEASURED_ELSEWHERE = {
    "llama3_openwebtext": "What can be measured with random weights has been: {doc}`../throughput`, {doc}`../scaling`, "
    "and the paper's claim beside another system on {doc}`../systems`."
}


def stub(page: Page, refused: Sequence[str] = ()) -> str:
    """The page where there is no verified run: what it would show and the command that makes it.

    Args:
        page: the page.
        refused: reasons why runs that exist were not taken.

    Returns:
        MyST Markdown.
    """
    lines = [f"# {page.title}", "", ":::{admonition} Not run yet", ":class: warning"]
    lines.append(
        f"The book was built without a verified run of this pair at {page.scale} scale, so this page is empty."
    )
    lines += [":::", "", "This command makes the run, and the next build of the book shows it here:", ""]
    lines += ["```bash", page.command, "grass book", "```", ""]
    if page.scale == "paper":
        lines.append(
            "The paper's scale uses the paper's data and sizes and wants a GPU. "
            "`grass doctor` says whether it would work on this machine and what is missing."
        )
        if page.experiment in _MEASURED_ELSEWHERE:
            lines += ["", _MEASURED_ELSEWHERE[page.experiment]]
    if refused:
        lines += ["", "Runs that were found and refused:", "", *[f"- {reason}" for reason in refused]]
    return "\n".join(lines) + "\n"
