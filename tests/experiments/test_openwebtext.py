"""OpenWebText from local files, documents of the package, and batches whose padding never counts."""

import json

import pyarrow
import pytest
import torch
from pyarrow import parquet

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data import documents, openwebtext
from grass_lib.experiments.data.documents import TITLES, load_documents
from grass_lib.experiments.data.passages import batch_of, padded
from grass_lib.experiments.data.tokenizers import train_tokenizer

TEXTS = [f"document {number} about snow, sun and the number {number * number}. " * 4 for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 300)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    folder = tmp_path / "openwebtext"
    (folder / "part").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": TEXTS[:30], "other": list(range(30))}), folder / "part" / "a.parquet")
    (folder / "z.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in TEXTS[30:]), encoding="utf-8")
    return folder


def test_blocks_of_local_files(data, tokenizer):
    found = openwebtext.load_openwebtext(tokenizer, max_tokens=3000, length=16, seed=3, end=7)
    again = openwebtext.load_openwebtext(tokenizer, max_tokens=3000, length=16, seed=3, end=7)
    assert torch.equal(found.ids, again.ids)
    other = openwebtext.load_openwebtext(tokenizer, max_tokens=3000, length=16, seed=4, end=7)
    assert not torch.equal(found.ids, other.ids)
    assert (len(found), found.rows, found.kind) == (3000 // 16, 60, "official")
    assert found.tokens == found.ids.numel()
    # The blocks are cuts of all documents, one after the other with the end between them, in another order.
    stream = [token for text in TEXTS for token in [*tokenizer.encode(text), 7]]
    cuts = {tuple(stream[start : start + 16]) for start in range(len(stream) - 15)}
    assert {tuple(row) for row in found.ids.tolist()} <= cuts
    assert found.text(0) == tokenizer.decode(found.ids[0].tolist())


def test_too_little_text_is_said(data, tokenizer):
    with pytest.raises(DataError, match="blocks of 64 tokens"):
        openwebtext.load_openwebtext(tokenizer, max_tokens=10**6, length=64, seed=0, end=None)
    with pytest.raises(UsageError, match="at least one block"):
        openwebtext.load_openwebtext(tokenizer, max_tokens=10, length=64, seed=0, end=None)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"words": 3}\n', "line 2"),
        ("a.jsonl", b"not json\n", "could not be read"),
        ("a.parquet", b"not parquet", "could not be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, monkeypatch, tokenizer, name, content, match):
    (tmp_path / "openwebtext").mkdir()
    (tmp_path / "openwebtext" / name).write_bytes(content)
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    with pytest.raises(DataError, match=match) as error:
        openwebtext.load_openwebtext(tokenizer, max_tokens=3000, length=16, seed=0, end=None)
    assert name in str(error.value)


def test_a_table_without_text_is_refused(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "openwebtext").mkdir()
    parquet.write_table(pyarrow.table({"words": ["a"]}), tmp_path / "openwebtext" / "a.parquet")
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    with pytest.raises(DataError, match="columns words"):
        openwebtext.load_openwebtext(tokenizer, max_tokens=3000, length=16, seed=0, end=None)


def test_the_hub_is_tried_twice(tmp_path, monkeypatch, tokenizer):
    import datasets

    asked = []

    def load(name, **options):
        asked.append((name, options["revision"]))
        if options["revision"] is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return [{"text": text} for text in TEXTS]

    monkeypatch.delenv("GRASS_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    found = openwebtext.load_openwebtext(tokenizer, max_tokens=1500, length=16, seed=0, end=None)
    assert asked == [(openwebtext.HUB, None), (openwebtext.HUB, "refs/convert/parquet")]
    assert "hub" in found.source

    def never(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", never)
    with pytest.raises(DataError, match="no network") as error:
        openwebtext.load_openwebtext(tokenizer, max_tokens=1500, length=16, seed=0, end=None)
    assert "GRASS_DATA" in str(error.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in openwebtext.openwebtext_problems()[0]


def test_random_blocks():
    found = openwebtext.random_blocks(50, max_tokens=100, length=16, seed=0)
    assert found.ids.shape == (6, 16)
    assert found.kind == "substitute"
    assert "throughput only" in found.source
    assert "random tokens" in found.text(2)


def test_padding_and_prompts_have_labels_that_do_not_count():
    ids, lengths = padded([[5, 6, 7], [8]], 1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    batch = batch_of(ids, lengths, torch.tensor([1, 0]))
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    with pytest.raises(UsageError, match="one token or more"):
        padded([[1], []], 0)
    with pytest.raises(UsageError, match="one token or more"):
        padded([], 0)


def test_documents_of_the_package(tokenizer, monkeypatch):
    found = load_documents(tokenizer, length=20, per_article=2, padding=0)
    assert len(found) == 2 * len(TITLES) == 40
    assert found.titles[:4] == ("Albedo", "Albedo", "Apollo 11", "Apollo 11")
    assert found.text(2).startswith("Apollo 11: ")
    assert found.lengths.max() == 20
    first, *_, last = found.batches(7)
    assert (len(first["labels"]), len(last["labels"])) == (7, 5)
    assert (first["labels"] != -100).sum(dim=1).tolist() == found.lengths[:7].tolist()
    monkeypatch.setattr(documents, "load_articles", lambda: [])
    with pytest.raises(DataError, match="0 paragraphs"):
        load_documents(tokenizer, length=20, per_article=1, padding=0)
    with pytest.raises(UsageError, match="1 or more"):
        found.batches(0)
