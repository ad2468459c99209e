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
from grass_lib.report.interactive import lds_figure_html
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


def toy_ranked(n_query: int = 6, n_train: int = 40, k: int = 5) -> Any:
    generator = np.random.default_rng(0)
    scores = np.sort(generator.normal(size=(n_query, 2, k)), axis=-1)
    scores[:, 0], scores[:, 1] = np.abs(scores[:, 0])[:, ::-1], -np.abs(scores[:, 1])
    return SimpleNamespace(indices=generator.integers(0, n_train, (n_query, 2, k)), scores=scores)


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


def toy_notebook(sentinel: str = "done", images: tuple[Any, Any] | None = None) -> nbformat.NotebookNode:
    """What a notebook looks like after execution: figures, tables, a gallery, an interactive figure."""
    drawn = _draw_outputs(*images) if images else json.loads(_toy_outputs())
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


def write_run(
    folder: Path, record: RunRecord, images: tuple[Any, Any] | None = None, changed: Sequence[str] = ()
) -> Path:
    """Writes a run that passes the five tests."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.to_json(), indent=1).encode()
    (folder / "record.json").write_bytes(text)
    sentinel = f"grass-run-complete {record.run_id} {hashlib.sha256(text).hexdigest()}"
    nbformat.write(toy_notebook(sentinel, images), folder / "notebook.ipynb")
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
