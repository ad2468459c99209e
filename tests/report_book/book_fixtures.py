"""A made-up run for the tests of the book: rows as a record holds them, and an executed notebook that shows them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from grass_lib.report.figures import lds_figure, time_figure
from grass_lib.report.galleries import image_gallery
from grass_lib.report.influence_tables import split_figure, split_table
from grass_lib.report.interactive import lds_figure_html
from grass_lib.report.music import gallery_note, music_html, places
from grass_lib.report.passages import passages_html
from grass_lib.report.published import published_rows
from grass_lib.report.record import RunRecord
from grass_lib.report.tables import lds_table, table_html, time_table

CEILING = {"mean": 0.5, "interval": [0.46, 0.54]}


def toy_rows(ks: tuple[int, ...] = (256, 512, 1024)) -> list[dict[str, Any]]:
    rows = []
    for place, family in enumerate(("random_mask", "sjlt", "fjlt", "grass", "normal", "rademacher")):
        for step, k in enumerate(ks if family not in ("normal", "rademacher") else ks[:1]):
            mean = 0.2 + 0.03 * place + 0.02 * step
            rows.append(
                {
                    "attributor": "trak",
                    "sparsification": "identity",
                    "projection": f"{family}-{k}",
                    "spec": f"{family}-{k}",
                    "k": k,
                    "lds": {
                        "mean": mean,
                        "interval": [mean - 0.03, mean + 0.035],
                        "n_models": 30,
                        "n_queries": 90,
                        "n_undefined": 0,
                    },
                    "noise_ceiling": CEILING,
                    "damping": 0.1,
                    "damping_convention": "relative",
                    "projection_seconds": 0.01 * (1 + place**2) * (1 + step),
                    "backend": "torch",
                    "operator": family,
                }
            )
    return rows


FACTORED = (
    ("random_mask-{d}*{d}", "identity"),
    ("sjlt-{d}*{d}", "identity"),
    ("normal-{d}*{d}", "identity"),
    ("random_mask-{two}*{two}", "sjlt-{k}"),
)


def factored_rows(sides: tuple[int, ...] = (16, 32, 64)) -> list[dict[str, Any]]:
    """Rows of influence functions, as published but with other numbers."""
    rows = []
    for place, (first, second) in enumerate(FACTORED):
        for step, d in enumerate(sides):
            sparsification = first.format(d=d, two=2 * d)
            projection = second.format(k=d * d)
            mean = 0.1 + 0.01 * place + 0.05 * step
            compression = 2.0 + 3 * place
            rows.append(
                {
                    "attributor": "influence_efim",
                    "sparsification": sparsification,
                    "projection": projection,
                    "spec": f"{sparsification}->{projection}",
                    "k": d * d,
                    "lds": {
                        "mean": mean,
                        "interval": [mean - 0.02, mean + 0.02],
                        "n_models": 50,
                        "n_queries": 433,
                        "n_undefined": 0,
                    },
                    "noise_ceiling": {"mean": 0.6, "interval": [0.55, 0.65]},
                    "damping": 0.1,
                    "damping_convention": "relative",
                    "projection_seconds": compression,
                    "backend": "torch",
                    "operator": first.split("-")[0],
                    "k_total": 48 * d * d,
                    "layers": 48,
                    "head_included": False,
                    "tokens_per_second": 90_000.0 - 2_000 * place,
                    "seconds": {
                        "gradients": 20.0,
                        "compression": compression,
                        "writing": 0.5 * (1 + step),
                        "curvature": 1.0 + 2 * step,
                        "scoring": 3.0,
                    },
                    "stored_bytes": 4656 * 48 * d * d * 2,
                }
            )
    return rows


WORDS = (
    "the",
    "river",
    "was",
    "crossed",
    "by",
    "<unk>",
    "troops",
    "@-@",
    "$",
    "1916 ,",
    "and\n\n",
    "= Siege =",
    "5 < 7 &",
)


def toy_passage(index: int) -> str:
    generator = np.random.default_rng(index)
    return " ".join(generator.choice(WORDS, 90))


def toy_passages(embed: bool = False, n_query: int = 3, per_side: int = 3) -> str:
    ranked = toy_ranked(n_query, 4000, per_side)
    return passages_html(
        [toy_passage(5000 + place) for place in range(n_query)],
        toy_passage,
        ranked,
        source="WikiText-2",
        licence="CC BY-SA 3.0",
        embed=embed,
    )


def toy_ranked(n_query: int = 6, n_train: int = 40, k: int = 5) -> Any:
    generator = np.random.default_rng(0)
    scores = np.sort(generator.normal(size=(n_query, 2, k)), axis=-1)
    scores[:, 0], scores[:, 1] = np.abs(scores[:, 0])[:, ::-1], -np.abs(scores[:, 1])
    return SimpleNamespace(indices=generator.integers(0, n_train, (n_query, 2, k)), scores=scores)


def toy_windows(n: int, piece: str) -> list[Any]:
    """Windows of a made-up piece: a walk of notes."""
    windows = []
    for number in range(n):
        generator = np.random.default_rng(number)
        pitches = 60 + np.cumsum(generator.integers(-4, 5, 16))
        events = [event for pitch in pitches.tolist() for event in (int(pitch), 256 + 29, 128 + int(pitch))]
        window = SimpleNamespace(
            ids=np.array(events), label=int(pitches[-1]), piece=piece, title=f"A. Nobody: {piece} & co", number=number
        )
        windows.append(window)
    return windows


def toy_music(listing: bool = False) -> str:
    train, queries = toy_windows(12, "train"), toy_windows(3, "query")
    ranked = toy_ranked(3, 12, 2)
    note = gallery_note(queries, train, ranked, range(3), spec="sjlt-8", source="made up", licence="public domain")
    return music_html(note, None if listing else places(train, queries))


def toy_images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (n, 28, 28), dtype=np.uint8)


def png_output(figure: Any) -> Any:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", transparent=True)
    return new_output(
        "execute_result",
        {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": "<Figure>"},
        execution_count=1,
    )


def html_output(text: str) -> Any:
    return new_output("execute_result", {"text/html": text, "text/plain": "<HTML>"}, execution_count=1)


@cache
def _toy_outputs() -> str:
    """The outputs, drawn once for all tests, as JSON."""
    return json.dumps(_draw_outputs(toy_images(6), toy_images(40, 1)))


def _draw_outputs(queries: Any, train: Any) -> list[Any]:
    rows = toy_rows()
    gallery = image_gallery(
        queries, train, toy_ranked(), queries=[0, 1, 2, 3], query_labels=np.arange(6), train_labels=np.arange(40) % 10
    )
    return [
        png_output(lds_figure(rows, noise_ceiling=CEILING)),
        html_output(table_html(lds_table(rows), "dt-lds", caption="LDS")),
        html_output(lds_figure_html(rows, noise_ceiling=CEILING)),
        png_output(time_figure(rows)),
        html_output(table_html(time_table(rows), "dt-time")),
        png_output(gallery),
    ]


@cache
def _text_outputs() -> str:
    rows = factored_rows()
    published = [row for row in published_rows("gpt2_wikitext") if "selective" not in row["sparsification"]]
    outputs = [
        html_output(table_html(lds_table(rows), "dt-lds")),
        html_output(lds_figure_html(rows, published=published, noise_ceiling=rows[0]["noise_ceiling"])),
        html_output(table_html(time_table(rows, published=published), "dt-time")),
        html_output(table_html(split_table(rows), "dt-split")),
        png_output(split_figure(rows)),
        html_output(toy_passages()),
    ]
    return json.dumps(outputs)


def toy_notebook(
    sentinel: str = "done", images: tuple[Any, Any] | None = None, text: bool = False, music: bool = False
) -> nbformat.NotebookNode:
    """What a notebook looks like after execution: figures, tables, a gallery, an interactive figure."""
    drawn = _draw_outputs(*images) if images else json.loads(_text_outputs() if text else _toy_outputs())
    drawn += [html_output(toy_music())] if music else []
    table = "| theirs | ours |\n| --- | ---: |\n| beside | 1.0 |\n"
    drawn += [{"output_type": "display_data", "data": {"text/markdown": table, "text/plain": "table"}, "metadata": {}}]
    outputs = [*map(nbformat.from_dict, drawn), new_output("stream", name="stdout", text=sentinel + "\n")]
    progress = new_output("stream", name="stderr", text="training: 50%|#####     |\n")
    cells: list[Any] = [new_markdown_cell("# MLP + MNIST\n\nA toy page with $\\phi^\\top \\phi$ in it.")]
    for count, output in enumerate(outputs, 1):
        if "execution_count" in output:
            output["execution_count"] = count
        cells.append(new_markdown_cell(f"## Part {count}"))
        cells.append(
            new_code_cell(
                f"show({count})", execution_count=count, outputs=[output, progress] if count == 1 else [output]
            )
        )
    for place, cell in enumerate(cells):
        cell["id"] = f"toy-{place}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def toy_record(run_id: str = "mlp_mnist-embedded-toy", scale: str = "embedded", **changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "run_id": run_id,
        "experiment": "mlp_mnist",
        "scale": scale,
        "data": {"source": "toy digits", "rows": 40, "sha256": "0" * 64, "kind": "embedded"},
        "parameters": {"seed": 0},
        "results": toy_rows() if scale == "embedded" else toy_rows((2048, 4096, 8192)),
        "phases": {"bank": 31.2, "cache": 12.0},
        "peak_bytes": 1,
        "stored_bytes": 1,
        "tokens_per_second": None,
        "device": {"type": "cpu", "name": "toy CPU"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "source_hash": "0" * 64,
        "modules": {},
        "git_commit": None,
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:01:00+00:00",
    }
    return RunRecord(**{**fields, **changes})


def text_record(run_id: str = "gpt2_wikitext-paper-toy", scale: str = "paper", **changes: Any) -> RunRecord:
    """A made-up run of influence functions on substitute data."""
    fields: dict[str, Any] = {
        "experiment": "gpt2_wikitext",
        "data": {"source": "toy text", "rows": 40, "sha256": "0" * 64, "kind": "substitute"},
        "parameters": {"seed": 0, "data": "validation+test", "base": "scratch"},
        "results": factored_rows(),
        "extra": {"weights": "substitute"},
        "device": {"type": "cuda", "name": "toy GPU"},
    }
    return toy_record(run_id, scale, **{**fields, **changes})


def write_run(
    folder: Path, record: RunRecord, images: tuple[Any, Any] | None = None, changed: Sequence[str] = ()
) -> Path:
    """Writes a run that passes the five tests."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.to_json(), indent=1).encode()
    (folder / "record.json").write_bytes(text)
    sentinel = f"grass-run-complete {record.run_id} {hashlib.sha256(text).hexdigest()}"
    text_pair, music_pair = record.experiment == "gpt2_wikitext", record.experiment == "musictransformer_maestro"
    nbformat.write(toy_notebook(sentinel, images, text_pair, music_pair), folder / "notebook.ipynb")
    status = {
        "run_id": record.run_id,
        "experiment": record.experiment,
        "scale": record.scale,
        "exit_code": 0,
        "started": record.started,
        "ended": record.finished,
        "parameters": record.parameters,
        "changed": list(changed),
        "data_fingerprint": "0" * 64,
        "template_sha256": "0" * 64,
        "modules": {},
        "notebook_sha256": hashlib.sha256((folder / "notebook.ipynb").read_bytes()).hexdigest(),
        "error": None,
        "schema_version": 1,
    }
    (folder / "status.json").write_text(json.dumps(status))
    return folder
