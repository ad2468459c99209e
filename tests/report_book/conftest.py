"""The book, built once for all tests from a copy of its sources and a made-up run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from book_fixtures import text_record, toy_record, write_run

REPOSITORY = Path(__file__).resolve().parents[2]


def copy_sources(target: Path) -> Path:
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(REPOSITORY / name, target / name)
    ignored = shutil.ignore_patterns("executed", "_generated", "measured", "__pycache__")
    shutil.copytree(REPOSITORY / "book", target / "book", ignore=ignored)
    (target / "notebooks").mkdir()
    return target


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("GRASS_RUNS", raising=False)
    return copy_sources(tmp_path)


@pytest.fixture(scope="session")
def built_book(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from grass_lib.report.book import build

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GRASS_RUNS", raising=False)
        root = copy_sources(tmp_path_factory.mktemp("book"))
        write_run(root / "runs" / "mlp_mnist-embedded-toy", toy_record())
        write_run(root / "runs" / "gpt2_wikitext-paper-toy", text_record())
        music = "musictransformer_maestro-embedded-toy"
        write_run(root / "runs" / music, toy_record(music, experiment="musictransformer_maestro"))
        index = build(root)
    yield index.parent
    shutil.rmtree(root, ignore_errors=True)
