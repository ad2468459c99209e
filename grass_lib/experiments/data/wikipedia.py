"""Wikipedia articles that come with a pip package: the beginning of a dump of 2016, cleaned of its markup."""

from __future__ import annotations

import bz2
import hashlib
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

import torch
from torch import Tensor

from grass_lib.errors import DataError
from grass_lib.experiments.data.blocks import TextBlocks, blocks_hash, cut_blocks
from grass_lib.experiments.data.sources import package_file
from grass_lib.experiments.data.tokenizers import train_tokenizer
from grass_lib.rng import Stream

PACKAGE = "gensim"
_FILE = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_XML = "{http://www.mediawiki.org/xml/export-0.10/}"
_SHORTEST = 2000
"""Characters of cleaned text below which an article is left out."""
# Articles for the base model, to fine-tune on, to ask about.
_BASE, _TRAIN, _QUERY = slice(0, 40), slice(42, 74), slice(75, 89)

_TAGS = "ref|math|gallery|timeline|code|source|syntaxhighlight|pre|score|imagemap|hiero|chem|graph|nowiki"
_REMOVED = re.compile(rf"<!--.*?-->|<(?:{_TAGS})\b[^<>]*/>|<({_TAGS})\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\{\{[^{}]*\}\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]|]*)(?:\|([^\[\]]*))?\]\]")
_NAMESPACE = re.compile(r"\s*(?:file|image|category|media|wikipedia|template|portal|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.I)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:)?//[^\s\]]*\s*([^\[\]]*)\]")
_ADDRESS = re.compile(r"(?:https?|ftp)://[^\s\])}>]*")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"(={2,6})\s*(.*?)\s*\1\s*")
_EMPTY_BRACKETS = re.compile(r"\s*\(\s*[,;:.–/\s]*\)")
_AFTER_BRACKET = re.compile(r"\(\s*[,;:]+\s*")
_BEFORE_MARK = re.compile(r"[ \t]+([,.;:])(?=\s|$)")
_MARKUP = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{\||\|\}|\|\||''|</?[a-zA-Z]|^[|!{}]|__[A-Z]+__")
_TAIL = {
    *("see also", "references", "notes", "external links", "further reading", "bibliography", "sources", "footnotes"),
    *("notes and references", "references and notes", "citations", "works cited", "gallery", "in popular culture"),
    *("publications", "works", "filmography", "discography", "notes and citations", "endnotes"),
}


@dataclass(frozen=True)
class Article:
    """One cleaned article.

    Attributes:
        title: Its title.
        rows: Lines of text, each ended by a newline, headings marked by equals signs as in WikiText: the title first.
    """

    title: str
    rows: tuple[str, ...]

    @property
    def text(self) -> str:
        """All lines together."""
        return "".join(self.rows)


def load_articles() -> list[Article]:
    """The articles of the package, in the order of the dump; its code is not imported.

    Raises:
        DataError: The package is missing or its file has other content.
    """
    articles = list(_articles(bz2.decompress(_package_bytes())))
    if not articles:
        raise DataError(f"{_FILE} of the package {PACKAGE} holds no article; install {PACKAGE} again")
    return articles


def load_article_blocks(*, length: int, vocabulary: int, n_base: int, n_train: int, n_query: int) -> TextBlocks:
    """Blocks of tokens of the articles; no article has blocks of two purposes.

    The first 40 articles train tokenizer and base model, the next 32 are fine-tuned on, the last 14 are asked about;
    blocks are drawn from each set at random, always the same ones, in the order of the dump.

    Args:
        length: Tokens in a block.
        vocabulary: Entries of the tokenizer.
        n_base: Blocks for the base model.
        n_train: Training blocks.
        n_query: Query blocks.

    Raises:
        DataError: The package is missing, or the articles give fewer blocks.
    """
    articles = load_articles()
    tokenizer = train_tokenizer((article.text for article in articles[_BASE]), vocabulary)
    parts: list[Tensor] = []
    titles: list[tuple[str, ...]] = []
    for purpose, chosen, count in (("base", _BASE, n_base), ("train", _TRAIN, n_train), ("query", _QUERY, n_query)):
        blocks: list[Tensor] = []
        names: list[str] = []
        for article in articles[chosen]:
            # Each article is a group, so that a block belongs to one article.
            ids, _ = cut_blocks(tokenizer.encode_rows(article.rows), length, len(article.rows))
            blocks.append(ids)
            names += [article.title] * len(ids)
        every = torch.cat(blocks)
        if len(every) < count:
            raise DataError(
                f"the {len(blocks)} articles for {purpose} give {len(every)} blocks of {length} tokens; expected "
                f"{count} or more. Use shorter or fewer blocks"
            )
        picked = Stream(0, "wikipedia", purpose).distinct(count, len(every))
        parts.append(every[picked])
        titles.append(tuple(names[index] for index in picked.tolist()))
    base, train, queries = parts
    return TextBlocks(
        train_ids=train,
        query_ids=queries,
        base_ids=base,
        train_titles=titles[1],
        query_titles=titles[2],
        tokenizer=tokenizer,
        source=f"{PACKAGE}: {len(articles)} English Wikipedia articles of 2016 (CC BY-SA), markup removed",
        kind="embedded",
        rows=sum(len(article.rows) for article in articles),
        sha256=blocks_hash(base, train, queries),
    )


def articles_fingerprint() -> str:
    """A hash of the package's file.

    Raises:
        DataError: As in `load_articles`.
    """
    return hashlib.sha256(_package_bytes()).hexdigest()


def clean(text: str) -> list[str]:
    """Paragraphs and headings of an article without markup: no templates, tables, lists, references or links.

    Args:
        text: Wiki markup.

    Returns:
        One line each, headings as ``== Heading ==``; nothing from the sections that only point elsewhere, and no
        heading without text below it.
    """
    lines: list[str] = []
    for line in _without_markup(text).split("\n"):
        found = _HEADING.fullmatch(line.strip())
        if found is None:
            cleaned = _tidy(line)
            if cleaned:
                lines.append(cleaned)
            continue
        marks, name = found[1], _tidy(found[2])
        if len(marks) == 2 and name.lower() in _TAIL:
            break
        while lines and (level := _level(lines[-1])) and level >= len(marks):
            lines.pop()
        if name:
            lines.append(f"{marks} {name} {marks}")
    while lines and _level(lines[-1]):
        lines.pop()
    return lines


def _package_bytes() -> bytes:
    return package_file(PACKAGE, _FILE, _SHA256)


def _articles(xml: bytes) -> Iterator[Article]:
    for page in ElementTree.fromstring(xml).iter(f"{_XML}page"):
        title = page.findtext(f"{_XML}title") or ""
        text = page.findtext(f"{_XML}revision/{_XML}text") or ""
        if page.findtext(f"{_XML}ns") != "0" or page.find(f"{_XML}redirect") is not None:
            continue
        if "(disambiguation)" in title or re.search(r"\{\{\s*(disambig|dab\b|geodis|hndis)", text, re.I):
            continue
        lines = clean(text)
        if sum(map(len, lines)) >= _SHORTEST:
            yield Article(title, (f" = {title} = \n", *(f" {line} \n" for line in lines)))


def _without_markup(text: str) -> str:
    text = _REMOVED.sub("", text)
    for pattern in (_TEMPLATE, _TABLE):
        # Innermost first: what is around them is found in the next round.
        count = 1
        while count:
            text, count = pattern.subn("", text)
    count = 1
    while count:
        text, count = _LINK.subn(_link_text, text)
    text = _ADDRESS.sub("", _EXTERNAL.sub(r"\1", text))
    text = re.sub(r"'{2,}", "", text)
    text = _TAG.sub("", re.sub(r"<br\s*/?>", " ", text, flags=re.I))
    return html.unescape(text).replace("\u00a0", " ")


def _link_text(found: re.Match[str]) -> str:
    target, label = found[1], found[2]
    if _NAMESPACE.match(target):
        return ""
    return target.lstrip(":") if label is None else label


def _tidy(line: str) -> str:
    """One line of prose; empty for lists, indented lines and whatever still has markup."""
    if line[:1] in ("*", "#", ":", ";", "|", "!"):
        return ""
    line = _AFTER_BRACKET.sub("(", _EMPTY_BRACKETS.sub("", line))
    line = _BEFORE_MARK.sub(r"\1", " ".join(line.split()))
    return "" if _MARKUP.search(line) or not re.search(r"[^\W\d_]", line) else line


def _level(line: str) -> int:
    """Depth of a heading; 0 for prose."""
    found = _HEADING.fullmatch(line)
    return len(found[1]) if found else 0
