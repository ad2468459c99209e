"""Collects the verified runs into the book and builds it, offline and without a warning.

`assemble` fills two generated folders, ``book/executed/`` (pages from runs) and ``book/_generated/`` (tables, figures
and numbers that pages include); `build` calls it and then Jupyter Book.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from grass_lib.errors import GrassError, RecordError, UsageError
from grass_lib.report.music_pages import with_music
from grass_lib.report.pages import Page, changed_parameters, pages_in_toc, stub, to_page
from grass_lib.report.redraw import redraw

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from grass_lib.report.record import RunRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shown:
    """A run that the book shows.

    Attributes:
        page: its page.
        folder: the run's folder.
        record: its record.
    """

    page: Page
    folder: Path
    record: RunRecord


def _records(folders: Iterable[Path]) -> list[tuple[Path, RunRecord]]:
    from grass_lib.report.record import load_record

    found = []
    for folder in folders:
        path = folder / "record.json"
        if not path.is_file():
            continue
        try:
            found.append((folder, load_record(path)))
        except RecordError as error:
            logger.warning("%s is left out of the book: %s", folder.name, error)
    return found


def newest_verified(root: Path, page: Page) -> tuple[Shown | None, list[str]]:
    """The verified run of a pair and scale that its page shows, from ``runs/`` first and then from ``book/measured/``.

    A run with the notebook's own parameters comes before those with others, and a newer one before an older one.

    Args:
        root: root of the repository.
        page: pair and scale.

    Returns:
        The run or None, and one line per run that exists but does not verify.
    """
    from grass_lib.project import runs_root
    from grass_lib.runner import verify_run
    from grass_lib.runner.collect import has_other_parameters, is_manual

    refused: list[str] = []
    runs = runs_root(root)
    places = (
        sorted(runs.iterdir()) if runs.is_dir() else [],
        [root / "book" / "measured" / f"{page.experiment}-{page.scale}"],
    )
    for folders in places:
        candidates = [
            (folder, record)
            for folder, record in _records(folder for folder in folders if folder.is_dir() and not is_manual(folder))
            if (record.experiment, record.scale) == (page.experiment, page.scale)
        ]
        newest = sorted(candidates, key=lambda item: str(item[1].finished), reverse=True)
        for folder, record in sorted(newest, key=lambda item: has_other_parameters(item[0])):
            problems = verify_run(folder)
            if not problems:
                return Shown(page, folder, record), refused
            refused.append(f"`{record.run_id}`: {problems[0]}")
            logger.warning("%s is left out of the book: %s", folder.name, "; ".join(problems))
    return None, refused


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _write_pages(root: Path, executed: Path, generated: Path) -> list[Shown]:
    import nbformat

    notebooks, records = _fresh(generated / "notebooks"), _fresh(generated / "records")
    shown: list[Shown] = []
    executed_notebooks: list[NotebookNode] = []
    for page in pages_in_toc(root / "_toc.yml"):
        found, refused = newest_verified(root, page)
        if found is None:
            (executed / f"{page.stem}.md").write_text(stub(page, refused), encoding="utf-8")
            continue
        shown.append(found)
        executed_notebooks.append(cast("NotebookNode", nbformat.read(found.folder / "notebook.ipynb", as_version=4)))
    # Runs of this machine were drawn by this version; stored ones may be months old.
    stored = [place for place, found in enumerate(shown) if found.folder.is_relative_to(root / "book" / "measured")]
    drawn = redraw([(executed_notebooks[place], shown[place].folder / "record.json") for place in stored])
    now = {place: one for place, one in zip(stored, drawn, strict=True) if one != executed_notebooks[place]}
    for place, found in enumerate(shown):
        page, others = found.page, list(_stored_variants(root, found, notebooks, records))
        shown_page = to_page(
            now.get(place, executed_notebooks[place]),
            found.record,
            page,
            changed_parameters(found.folder),
            others,
            redrawn=place in now,
        )
        nbformat.write(with_music(shown_page, found.record), executed / f"{page.stem}.ipynb")
        shutil.copyfile(found.folder / "notebook.ipynb", notebooks / f"{page.stem}.ipynb")
        shutil.copyfile(found.folder / "record.json", records / f"{page.stem}.json")
    return shown


def _stored_variants(root: Path, shown: Shown, notebooks: Path, records: Path) -> Iterator[tuple[str, str]]:
    """Other stored runs of the same pair and scale: what each was changed in, and the stem of its copies."""
    from grass_lib.runner import verify_run

    page = shown.page
    for folder in sorted((root / "book" / "measured").glob(f"{page.experiment}-{page.scale}*")):
        for path, record in _records([folder]):
            if record.run_id == shown.record.run_id or verify_run(path):
                continue
            shutil.copyfile(path / "notebook.ipynb", notebooks / f"{path.name}.ipynb")
            shutil.copyfile(path / "record.json", records / f"{path.name}.json")
            changed = " ".join(_short(name, record.parameters.get(name)) for name in changed_parameters(path))
            yield changed or record.run_id, path.name


def _short(name: str, value: Any) -> str:
    """A parameter; a long list is counted."""
    text = str(value)
    return f"{name}={text}" if len(text) < 40 else f"{name}=({len(text.split(','))} of them)"


def _headline(shown: list[Shown], pages: list[Page], folder: Path) -> str:
    """The figure of the introduction: the run nearest to the paper, or a note where there is no run at all."""
    from grass_lib.report.figure_files import figure_markdown
    from grass_lib.report.figures import draw_record
    from grass_lib.report.matching import Measured
    from grass_lib.report.style import ATTRIBUTOR_TITLES
    from grass_lib.report.tables import k_name, pick_rows

    with_lds = [item for item in shown if any(row.get("lds") for row in item.record.results)]
    ranked = sorted(with_lds, key=lambda item: item.page.scale != "paper" or bool(Measured(item.record, {}).substitute))
    if not ranked:
        command = pages[0].command if pages else "grass run"
        return (
            ":::{admonition} No run yet\n:class: warning\n"
            f"The figure of this page is drawn from a run. Make one: `{command}`, then `grass book`.\n:::\n"
        )
    best = ranked[0]
    files = draw_record(best.record, folder, formats=("svg",))
    image = next(path for path in files if path.name.endswith("_lds.svg"))
    rows = pick_rows(best.record)
    attributors = dict.fromkeys(str(ATTRIBUTOR_TITLES.get(row["attributor"], row["attributor"])) for row in rows)
    caption = (
        f"LDS against {k_name(rows)} ({', '.join(attributors)}), one line per compression, bars for the 95 % interval "
        f"over subsets and queries. Measured in run `{best.record.run_id}`"
    )
    if best.page.scale == "paper":
        caption += "; hollow markers are the published values."
    else:
        caption += "; its sizes are those of the embedded scale, not the paper's."
    return figure_markdown(
        image.name, caption, alt="LDS against k for each projection", options=[":name: fig-headline"]
    )


def _substitutes(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    from grass_lib.report.generated import substitutions

    (folder / "substitutions.json").write_text(json.dumps(substitutions(rows), indent=1) + "\n", encoding="utf-8")


def assemble(root: str | Path) -> list[Shown]:
    """Fills ``book/executed/`` and ``book/_generated/`` from verified runs; nothing else is written.

    Args:
        root: root of the repository, the folder of ``_config.yml``.

    Returns:
        The runs that the book will show.

    Raises:
        UsageError: the root has no ``_toc.yml``.
    """
    from grass_lib.report.capture import write_capture_section
    from grass_lib.report.dampings import damping_table
    from grass_lib.report.factored_seconds import factored_seconds_sentence
    from grass_lib.report.generated import pair_sections, verdict_table, write_ledger
    from grass_lib.report.interactive import published_figure_html
    from grass_lib.report.kernels import write_page_parts
    from grass_lib.report.ledger import ledger_rows
    from grass_lib.report.mask_pairs import mask_pairs, study_sentence
    from grass_lib.report.published import published_rows
    from grass_lib.report.recipes import recipe_section
    from grass_lib.report.scaling import write_scaling_parts
    from grass_lib.report.sides import sides_sentence
    from grass_lib.report.storage import write_plan_parts
    from grass_lib.report.systems_bench import write_systems_parts
    from grass_lib.report.systems_lds import systems_lds_markdown
    from grass_lib.report.throughput import write_throughput_parts
    from grass_lib.runner import verified_records

    root = Path(root).resolve()
    if not (root / "_toc.yml").is_file():
        raise UsageError(f"no _toc.yml in {root.name}/, expected the root of the repository; run from there")
    executed, generated = _fresh(root / "book" / "executed"), _fresh(root / "book" / "_generated")
    shown = _write_pages(root, executed, generated)
    records = verified_records(root, scale="paper")
    rows = ledger_rows(records, root / "book" / "measured")
    write_ledger(rows, generated)
    _substitutes(rows, generated)
    pages = pages_in_toc(root / "_toc.yml")
    documents: dict[str, list[str]] = {}
    for page in pages:
        documents.setdefault(page.experiment, []).append(f"executed/{page.stem}")
    (generated / "pairs.md").write_text(pair_sections(rows, documents), encoding="utf-8")
    (generated / "verdicts.md").write_text(verdict_table(rows), encoding="utf-8")
    (generated / "headline.md").write_text(_headline(shown, pages, generated / "figures"), encoding="utf-8")
    (generated / "recipes.md").write_text(recipe_section(records), encoding="utf-8")
    (generated / "mask_pairs.md").write_text(mask_pairs(records), encoding="utf-8")
    (generated / "mask_study.md").write_text(study_sentence(records), encoding="utf-8")
    (generated / "music_sides.md").write_text(sides_sentence(rows, "musictransformer_maestro"), encoding="utf-8")
    (generated / "resnet_sides.md").write_text(sides_sentence(rows, "resnet9_cifar2"), encoding="utf-8")
    (generated / "factored_seconds.md").write_text(factored_seconds_sentence(rows, records), encoding="utf-8")
    (generated / "dampings.md").write_text(damping_table(records), encoding="utf-8")
    write_page_parts(root / "book" / "measured", generated)
    write_throughput_parts(root / "book" / "measured", generated)
    write_capture_section(root / "book" / "measured", generated)
    write_scaling_parts(root / "book" / "measured", generated)
    write_plan_parts(root / "book" / "measured", generated)
    write_systems_parts(root / "book" / "measured", generated)
    (generated / "systems_lds.md").write_text(systems_lds_markdown(records, generated / "figures"), encoding="utf-8")
    (generated / "published.html").write_text(published_figure_html(published_rows()) + "\n", encoding="utf-8")
    return shown


def build(root: str | Path, strict: bool = True) -> Path:
    """Collects the runs and builds the book from an empty ``_build``.

    Args:
        root: root of the repository.
        strict: fail on any warning.

    Returns:
        Path of the book's ``index.html``.

    Raises:
        UsageError: the root is not that of the repository.
        GrassError: Jupyter Book failed; the message ends with its last lines.
    """
    root = Path(root).resolve()
    assemble(root)
    shutil.rmtree(root / "_build", ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "--keep-going", "-n"]
    # The kernel's platform folders are not needed to render; asking for them only prints a warning.
    environment = {**os.environ, "JUPYTER_PLATFORM_DIRS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, *(["-W"] if strict else []), "."],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    index = root / "_build" / "html" / "index.html"
    if done.returncode or not index.is_file():
        text = (done.stdout + done.stderr).strip().splitlines()
        problems = [line for line in text if "WARNING" in line or "ERROR" in line] or text[-15:]
        raise GrassError("Jupyter Book could not build the book:\n" + "\n".join(problems[:30]))
    return index
