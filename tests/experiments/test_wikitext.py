"""Text of the language experiments: articles without markup, tokens, blocks."""

import re
from itertools import chain, pairwise

import pyarrow
import pytest
import torch
from pyarrow import parquet

from grass_lib.errors import DataError, UsageError
from grass_lib.experiments.data import tokenizers, wikipedia, wikitext
from grass_lib.experiments.data.blocks import blocks_hash, cut_blocks
from grass_lib.experiments.data.tokenizers import train_tokenizer

TEXTS = [f"Line {n} speaks of the {word} and of the sea. \n" for n in range(9) for word in ("cat", "dog", "lobster")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), 290)


@pytest.fixture(scope="module")
def articles():
    return wikipedia.load_articles()


def plain_blocks(rows, length, group):
    """One token at a time, without any tensor."""
    blocks, owners = [], []
    for start in range(0, len(rows), group):
        run = [(token, start + place) for place, row in enumerate(rows[start : start + group]) for token in row]
        while len(run) >= length:
            block, run = run[:length], run[length:]
            blocks.append([token for token, _ in block])
            owners.append(block[length // 2][1])
    return blocks, owners


@pytest.mark.parametrize(("length", "group"), [(4, 5), (7, 3), (16, 1000), (1, 2), (50, 4)])
def test_blocks_are_those_of_a_plain_loop(length, group):
    generator = torch.Generator().manual_seed(length)
    sizes = torch.randint(0, 9, (23,), generator=generator).tolist()
    rows = [torch.randint(0, 99, (size,), generator=generator).tolist() for size in sizes]
    blocks, owners = cut_blocks(rows, length, group)
    expected, expected_owners = plain_blocks(rows, length, group)
    assert blocks.tolist() == expected
    assert owners == expected_owners
    assert blocks.dtype == torch.int64
    assert blocks.shape[1] == length


def test_blocks_of_nothing():
    assert cut_blocks([], 8)[0].shape == (0, 8)
    assert cut_blocks([[], []], 8)[1] == []
    with pytest.raises(UsageError, match="expected"):
        cut_blocks([[1]], 0)


def test_hash_of_blocks_depends_on_values_and_shape():
    first = torch.arange(12).view(3, 4)
    assert blocks_hash(first) == blocks_hash(first.clone())
    assert len({blocks_hash(first), blocks_hash(first.view(4, 3)), blocks_hash(first + 1)}) == 3


def test_tokens_go_back_to_the_text(tokenizer):
    assert tokenizer.size == 290
    for text in (TEXTS[3], "Ünicode – 日本, tabs\tand  spaces \n", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_rows(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    again = train_tokenizer(iter(TEXTS), 290)
    assert again.encode_rows(TEXTS) == tokenizer.encode_rows(TEXTS)
    with pytest.raises(DataError, match="expected 5000"):
        train_tokenizer(iter(TEXTS), 5000)


def test_articles_have_no_markup_left(articles):
    assert len(articles) == 89
    assert articles[0].title == "Anarchism"
    assert len({article.title for article in articles}) == 89
    for article in articles:
        assert article.rows[0] == f" = {article.title} = \n"
        assert len(article.text) >= 2000
        assert len(article.rows) > 3
        assert all(row == f" {row.strip()} \n" and row.strip() for row in article.rows)
        found = re.search(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|'''|&nbsp;|&lt;|<ref|</|https?://|\[https?", article.text)
        assert found is None, (article.title, found)
        # No heading stands directly above one of the same or a higher level, nor at the end.
        levels = [len(row.strip().split(" ")[0]) if row.startswith(" ==") else 0 for row in article.rows]
        assert levels[-1] == 0
        assert not any(here and after and after <= here for here, after in pairwise(levels))


def test_cleaner_on_known_markup():
    text = """{{Infobox|a={{nested|x}}}}
'''Bold''' and ''slanted'' [[Target|label]] of [[plain]]<ref name="a">gone {{cite}}</ref><ref name="b" /> ( ; ), end.
[[File:a.png|thumb|A [[caption]] with link]]
* a list item
{| class="wikitable"
| a cell
|}
== Kept ==
=== Empty ===
=== Full ===
It costs [http://example.org five pounds] &amp; more, see http://example.org/x today<br />now.<!-- hidden
-->
== See also ==
* [[Other]]
== Late ==
Never read."""
    assert wikipedia.clean(text) == [
        "Bold and slanted label of plain, end.",
        "== Kept ==",
        "=== Full ===",
        "It costs five pounds & more, see today now.",
    ]


def test_a_cleaned_article_may_be_empty():
    assert wikipedia.clean("{{stub}}\n== Heading ==\n* list\n") == []


def test_article_blocks(articles):
    data = wikipedia.load_article_blocks(length=128, vocabulary=1024, n_base=300, n_train=60, n_query=20)
    assert [len(part) for part in (data.base_ids, data.train_ids, data.query_ids)] == [300, 60, 20]
    assert data.length == 128
    assert data.kind == "embedded"
    # By article, so that no text is on two sides.
    order = {article.title: place for place, article in enumerate(articles)}
    assert {order[title] for title in data.train_titles} <= set(range(42, 74))
    assert {order[title] for title in data.query_titles} <= set(range(75, 89))
    texts = {article.title: article.text for article in articles}
    for index in (0, 17, 59):
        # A block may begin or end within a character of several bytes.
        assert data.passage(index).strip("\ufffd") in texts[data.train_titles[index]]
    base = "".join(article.text for article in articles[:40])
    assert data.tokenizer.decode(data.base_ids[5].tolist()).strip("\ufffd") in base
    assert len({tuple(row.tolist()) for row in torch.cat([data.base_ids, data.train_ids, data.query_ids])}) == 380
    with pytest.raises(UsageError, match="expected 0 to 59"):
        data.passage(60)
    with pytest.raises(DataError, match="expected 100000 or more"):
        wikipedia.load_article_blocks(length=128, vocabulary=1024, n_base=100_000, n_train=60, n_query=20)


def write_split(folder, split, texts):
    (folder / "wikitext2").mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table({"text": texts}), folder / "wikitext2" / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def small_wikitext(tmp_path, monkeypatch, tokenizer):
    """Three splits of a toy WikiText-2 with blocks of 16."""
    splits = {
        split: list(chain.from_iterable(("", f" = {split} {n} = \n", *TEXTS[:4], " = = Part = = \n") for n in range(5)))
        for split in ("train", "validation", "test")
    }
    for split, texts in splits.items():
        write_split(tmp_path, split, texts)
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    monkeypatch.setattr(wikitext, "gpt2_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(wikitext, "LENGTH", 16)
    counts = {split: len(plain_blocks(tokenizer.encode_rows(texts), 16, 1000)[0]) for split, texts in splits.items()}
    monkeypatch.setattr(
        wikitext,
        "_COUNTS",
        {data: {split: counts[split] for split in wikitext._SPLITS[data]} for data in wikitext.CHOICES},
    )
    monkeypatch.setattr(wikitext, "_TRAIN_TEST_BLOCKS", 3)
    return tmp_path, splits, counts


def test_official_data(small_wikitext, tokenizer):
    _, splits, counts = small_wikitext
    data = wikitext.load_wikitext()
    assert data.kind == "official"
    assert data.train_ids.tolist() == plain_blocks(tokenizer.encode_rows(splits["train"]), 16, 1000)[0]
    assert len(data.query_ids) == counts["validation"]
    assert torch.equal(data.base_ids, data.train_ids)
    assert data.rows == len(splits["train"]) + len(splits["validation"])
    assert data.train_titles[0] == "train 0"
    assert set(data.query_titles) == {f"validation {n}" for n in range(5)}


def test_substitute_data(small_wikitext):
    _, _, counts = small_wikitext
    data = wikitext.load_wikitext("validation+test")
    assert data.kind == "substitute"
    assert len(data.train_ids) == counts["validation"] + 3
    assert len(data.query_ids) == counts["test"] - 3
    assert data.train_titles[0] == "validation 0"
    assert data.train_titles[-1] == "test 0"
    assert data.sha256 != wikitext.load_wikitext().sha256
    assert "training split left out" in data.source


@pytest.mark.parametrize(("data", "version"), [("wikitext-2-raw-v1", "raw-v1"), ("validation+test", "v1")])
def test_hub(small_wikitext, monkeypatch, data, version):
    _, splits, _ = small_wikitext
    asked = []

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return {"text": splits[split]}

    expected = wikitext.load_wikitext(data)
    monkeypatch.delenv("GRASS_DATA")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert wikitext.load_wikitext(data).sha256 == expected.sha256
    assert asked == [("Salesforce/wikitext", f"wikitext-2-{version}", split) for split in wikitext._SPLITS[data]]

    def fail(path, name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(DataError, match=r"no network.*Set GRASS_DATA"):
        wikitext.load_wikitext(data)


def test_other_text_is_not_called_official(small_wikitext, tokenizer, monkeypatch):
    folder, splits, counts = small_wikitext
    texts = [text.replace("sea", "<unk>") for text in splits["train"]]
    write_split(folder, "train", texts)
    with pytest.raises(DataError, match=f"blocks of 16 tokens; expected {counts['train']}"):
        wikitext.load_wikitext()
    found = len(plain_blocks(tokenizer.encode_rows(texts), 16, 1000)[0])
    monkeypatch.setitem(wikitext._COUNTS, wikitext.OFFICIAL, {"train": found, "validation": counts["validation"]})
    assert wikitext.load_wikitext().kind == "substitute"


def test_missing_splits(small_wikitext, monkeypatch):
    folder, _, _ = small_wikitext
    before = wikitext.wikitext_fingerprint()
    (folder / "wikitext2" / "train-00000-of-00001.parquet").unlink()
    assert wikitext.wikitext_fingerprint() != before
    assert wikitext.wikitext_problems("validation+test") == []
    (problem,) = wikitext.wikitext_problems("wikitext-2-raw-v1")
    assert "has no wikitext2/train-00000-of-00001.parquet" in problem
    assert "-p data=validation+test -p base=scratch" in problem
    with pytest.raises(DataError, match="train-00000"):
        wikitext.load_wikitext()
    (folder / "wikitext2" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        wikitext.load_wikitext("validation+test")
    with pytest.raises(UsageError, match="expected one of"):
        wikitext.load_wikitext("test")
    monkeypatch.delenv("GRASS_DATA")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in wikitext.wikitext_problems("validation+test")[0]


def test_gpt2_tokenizer_files(tmp_path, monkeypatch):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    monkeypatch.setenv("GRASS_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in tokenizers.tokenizer_problems()[0]
    assert tokenizers.tokenizer_fingerprint().startswith("hub:")
    (folder / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert tokenizers.tokenizer_problems() == []
    assert not tokenizers.tokenizer_fingerprint().startswith("hub:")
    with pytest.raises(DataError, match="3 entries; expected the 50,257"):
        tokenizers.gpt2_tokenizer()
    (folder / "vocab.json").write_text("[")
    with pytest.raises(DataError, match="cannot be read"):
        tokenizers.gpt2_tokenizer()
