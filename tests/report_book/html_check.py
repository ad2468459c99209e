"""A static check of built HTML: internal links, anchors, ids, and anything that would be fetched from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_OUTSIDE = re.compile(r"^(https?:)?//")
_CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and "href" in values and values.get("rel") not in ("canonical", "next", "prev", "author"):
            self.loads.append(values["href"])


def _parse(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def check_html(root: Path) -> list[str]:
    """Problems of every page below `root`, one line each."""
    problems: list[str] = []
    pages = {path: _parse(path) for path in sorted(root.rglob("*.html")) if "_static" not in path.parts}
    for path, page in pages.items():
        name = path.relative_to(root)
        problems += [f"{name}: id {item!r} appears twice" for item in set(page.ids) if page.ids.count(item) > 1]
        problems += [f"{name}: loads {item} from outside" for item in page.loads if _OUTSIDE.match(item)]
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or _OUTSIDE.match(link):
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if not target.exists():
                problems.append(f"{name}: {link} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                problems.append(f"{name}: {link} has no such anchor")
    for path in sorted(root.rglob("*.css")):
        for match in _CSS_URL.finditer(path.read_text(encoding="utf-8", errors="replace")):
            if _OUTSIDE.match(match[1] or match[2]):
                problems.append(f"{path.relative_to(root)}: loads {match[1] or match[2]} from outside")
    return problems
