"""One hundred short documents: paragraphs of the Wikipedia articles that come with a pip package."""

from __future__ import annotations

from grass_lib.errors import DataError
from grass_lib.experiments.data.blocks import blocks_hash
from grass_lib.experiments.data.passages import PassageSet, padded
from grass_lib.experiments.data.tokenizers import Tokenizer
from grass_lib.experiments.data.wikipedia import PACKAGE, load_articles

TITLES = (
    *("Albedo", "Apollo 11", "Aardvark", "Animal Farm", "Abacus", "Aikido", "Abraham Lincoln", "Algorithm", "Alkane"),
    *("Arithmetic mean", "Academy Awards", "Agriculture", "Aristotle", "Amphibian", "Atlantic Ocean", "Alphabet"),
    *("Andre Agassi", "Animation", "Asphalt", "Albert Einstein"),
)
"""Articles that the documents are taken from: those that prompts ask about, and as many others."""
_SHORTEST = 200
"""Characters of a paragraph that can be a document."""


def load_documents(tokenizer: Tokenizer, *, length: int, per_article: int, padding: int) -> PassageSet:
    """The first long paragraphs of each article, cut after ``length`` tokens.

    Args:
        tokenizer: Of the model.
        length: Longest document, in tokens.
        per_article: Documents of an article.
        padding: Token that fills shorter documents.

    Raises:
        DataError: The package is missing, or an article has fewer paragraphs.
    """
    articles = {article.title: article for article in load_articles()}
    texts: list[str] = []
    titles: list[str] = []
    for title in TITLES:
        rows = articles[title].rows if title in articles else ()
        found = [row.strip() for row in rows if len(row) >= _SHORTEST and not row.lstrip().startswith("=")][
            :per_article
        ]
        if len(found) < per_article:
            raise DataError(
                f"the article {title} gives {len(found)} paragraphs of {_SHORTEST} characters; expected {per_article}. "
                f"Install the version of {PACKAGE} that requirements.txt names"
            )
        texts += found
        titles += [title] * per_article
    ids, lengths = padded([row[:length] for row in tokenizer.encode_rows(texts)], padding)
    return PassageSet(
        ids=ids,
        lengths=lengths,
        titles=tuple(titles),
        text=lambda index: f"{titles[index]}: {tokenizer.decode(ids[index, : lengths[index]].tolist())}",
        source=f"{PACKAGE}: paragraphs of {len(TITLES)} English Wikipedia articles of 2016, markup removed",
        kind="embedded",
        rows=len(texts),
        sha256=blocks_hash(ids, lengths),
    )
