"""The built book in a real browser, from the disk, with the network cut off."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
PAGES = re.findall(r"(?:root|file): (book/\S+)", (ROOT / "_toc.yml").read_text(encoding="utf-8"))
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",  # a reader clicks, a test does not
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1280,900",
)
READY = """
const all = selector => [...document.querySelectorAll(selector)];
const done = (outer, inner) => all(outer).every(node => node.querySelector(inner) || node.matches(inner));
return document.readyState === 'complete' && done('.plotly-graph-div', '.main-svg')
  && all('.grass-table').length === all('.grass-table .dt-container').length
  && done('.math', 'mjx-container') && [...document.images].every(image => image.complete);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium = os.environ.get("GRASS_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver here; `apt-get install chromium chromium-driver` adds them")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


def _open(browser: Any, book: Path, page: str, theme: str = "light") -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get((book / f"{page}.html").as_uri())
    # On a busy machine the page may still write its own theme over the one that is set here, hence again.
    for _ in range(3):
        browser.execute_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.refresh()
        WebDriverWait(browser, 40, poll_frequency=0.2).until(lambda session: session.execute_script(READY))
        if browser.execute_script("return document.documentElement.dataset.theme") == theme:
            return


def _errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def _requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("page", PAGES)
def test_page_shows_everything_without_the_network(browser: Any, built_book: Path, page: str) -> None:
    _open(browser, built_book, page)
    assert _errors(browser) == []
    requests = _requests(browser)
    assert requests
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.execute_script("return [...document.images].filter(image => image.naturalWidth === 0).length") == 0


def test_the_first_page_that_a_reader_opens_reports_no_error(browser: Any, built_book: Path) -> None:
    _open(browser, built_book, "book/references")
    browser.execute_script("localStorage.clear()")
    browser.get_log("browser")
    browser.refresh()
    assert browser.execute_script("return localStorage.getItem('mode')") == "auto"  # the theme's script has run
    assert _errors(browser) == []


def test_run_page_has_figures_formulas_and_tables(browser: Any, built_book: Path) -> None:
    _open(browser, built_book, "book/executed/mlp_mnist_embedded")
    count = "return document.querySelectorAll(arguments[0]).length"
    assert browser.execute_script(count, ".cell_output img") == 3
    assert browser.execute_script(count, "div.dt-container") == 2
    assert browser.execute_script(count, ".plotly-graph-div .scatterlayer .trace") == 7
    assert browser.execute_script(count, "mjx-container svg") >= 1
    assert browser.execute_script("return document.querySelector('details.hide').open") is False
    _open(browser, built_book, "book/method")
    formulas = (ROOT / "book" / "method.md").read_text(encoding="utf-8").count("```{math}")
    assert browser.execute_script(count, "mjx-container[display=true] svg") == formulas > 10
    assert browser.execute_script(count, "mjx-merror, [data-mml-node=merror]") == 0


def test_interactive_figures_keep_to_their_column_on_the_first_load(browser: Any, built_book: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    script = (
        "return [...document.querySelectorAll('.grass-interactive')].map("
        "box => box.querySelector('.main-svg').getBoundingClientRect().width - box.getBoundingClientRect().width)"
    )
    for page in ("book/pairs", "book/executed/mlp_mnist_embedded"):
        _open(browser, built_book, page)
        WebDriverWait(browser, 10).until(lambda session: all(extra <= 1 for extra in session.execute_script(script)))


def _cells(browser: Any, column: int) -> list[str]:
    rows = "document.querySelectorAll('#dt-ledger tbody tr')"
    script = f"return [...{rows}].map(row => row.cells[arguments[0]].innerText.trim())"
    return browser.execute_script(script, column)


def _published(browser: Any) -> list[float]:
    return [float(text) for text in _cells(browser, 4) if text.replace(".", "").isdigit()]


def test_ledger_sorts_filters_and_searches(browser: Any, built_book: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 10, poll_frequency=0.1)
    _open(browser, built_book, "book/ledger")
    info = "return document.querySelector('.dt-info').innerText"
    assert "of 112 entries" in browser.execute_script(info)
    header = browser.find_elements(By.CSS_SELECTOR, "#dt-ledger thead th")[4]
    assert "Published" in header.text
    assert _published(browser) != sorted(_published(browser))
    header.click()
    wait.until(lambda session: len(_published(session)) > 10 and _published(session) == sorted(_published(session)))
    header.click()
    wait.until(lambda session: _published(session) == sorted(_published(session), reverse=True))

    browser.find_element(By.CSS_SELECTOR, "#dt-ledger thead th .dtcc-button").click()
    entry = next(
        item for item in browser.find_elements(By.CSS_SELECTOR, ".dtcc-list-buttons button") if "GPT-2" in item.text
    )
    entry.click()
    wait.until(lambda session: set(_cells(session, 0)) == {"GPT-2 small + WikiText-2"})
    assert "of 18 entries" in browser.execute_script(info)

    search = browser.find_element(By.CSS_SELECTOR, ".dt-search input")
    search.send_keys("LoGra")
    wait.until(lambda session: set(_cells(session, 1)) == {"LoGra (normal)"})


def test_an_opened_reason_has_a_row_as_wide_as_the_table(browser: Any, built_book: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 10, poll_frequency=0.1)
    _open(browser, built_book, "book/ledger")
    assert browser.execute_script("return document.querySelectorAll('#dt-ledger details[open]').length") == 0
    overflow = "const b = document.querySelector('.grass-table'); return b.scrollWidth - b.clientWidth"
    shown = "return [...document.querySelectorAll('.ledger-reason')].map(row => row.innerText.trim().length > 20)"
    assert browser.execute_script(overflow) <= 0
    browser.execute_script("document.querySelectorAll('#dt-ledger summary')[3].click()")
    wait.until(lambda session: session.execute_script(shown) == [True])
    assert browser.execute_script(overflow) <= 0
    browser.execute_script("document.querySelectorAll('#dt-ledger summary')[3].click()")
    wait.until(lambda session: session.execute_script(shown) == [])


@pytest.mark.parametrize("page", PAGES)
def test_narrow_page_does_not_scroll_sideways(browser: Any, built_book: Path, page: str) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        _open(browser, built_book, page)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (390, 1)])
def test_passages_stand_side_by_side_where_there_is_room(
    browser: Any, built_book: Path, width: int, columns: int
) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        _open(browser, built_book, "book/executed/gpt2_wikitext_paper")
        script = (
            "return [...document.querySelectorAll('.gp-sides')].map("
            "box => new Set([...box.children].map(side => side.getBoundingClientRect().left)).size)"
        )
        assert browser.execute_script(script) == [columns] * 3
        assert browser.execute_script("return document.querySelectorAll('.grass-passages mjx-container').length") == 0
        wide = (
            "return [...document.querySelectorAll('.grass-passages *')].filter("
            "node => node.clientWidth && node.scrollWidth > node.clientWidth + 1).length"
        )
        assert browser.execute_script(wide) == 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_passages_are_readable_in_both_themes(browser: Any, built_book: Path, theme: str) -> None:
    _open(browser, built_book, "book/executed/gpt2_wikitext_paper", theme)
    script = (
        "const back = node => { for (let n = node; n; n = n.parentElement) {"
        "const c = getComputedStyle(n).backgroundColor; if (!c.startsWith('rgba(0, 0, 0, 0')) return c; }"
        "return 'rgb(255, 255, 255)'; };"
        "return ['.gp-query p', '.gp-score', '.gp-index', '.gp-passage p', '.gp-source'].map(name => {"
        "const node = document.querySelector(name); return [getComputedStyle(node).color, back(node)]})"
    )
    for text, background in browser.execute_script(script):
        low, high = sorted((_luminance(text), _luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_music_can_be_heard_and_seen_in_both_themes(browser: Any, built_book: Path, theme: str) -> None:
    _open(browser, built_book, "book/executed/musictransformer_maestro_embedded", theme)
    players = browser.execute_script("return [...document.querySelectorAll('audio')].map(a => [a.duration, a.error])")
    assert len(players) == 6
    assert all(3.0 < seconds < 10.0 and error is None for seconds, error in players)
    played = browser.execute_async_script(
        "const done = arguments[0], player = document.querySelector('audio'); player.muted = true;"
        "player.play().then(() => setTimeout(() => done(player.currentTime), 500), error => done(String(error)))"
    )
    assert isinstance(played, float)
    assert played > 0.1
    assert [url for url in _requests(browser) if not url.startswith(("file:", "data:", "blob:"))] == []
    sizes = (
        "return [...document.querySelectorAll('.gm-roll')].map(r => [r.getBoundingClientRect().width,"
        "r.getBoundingClientRect().height, getComputedStyle(r).color])"
    )
    rolls = browser.execute_script(sizes)
    assert len(rolls) == 15
    assert all(width > 150 and height > 60 for width, height, _ in rolls)
    assert len({colour for *_, colour in rolls}) == 3
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    for colour in {colour for *_, colour in rolls}:
        low, high = sorted((_luminance(colour), _luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3.0


def _luminance(colour: str) -> float:
    numbers = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in numbers]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_verdicts_and_tables_are_readable_in_both_themes(browser: Any, built_book: Path, theme: str) -> None:
    _open(browser, built_book, "book/ledger", theme)
    assert browser.execute_script("return document.documentElement.dataset.theme") == theme
    assert browser.execute_script("return document.documentElement.classList.contains('dark')") is (theme == "dark")
    script = (
        "return [...document.querySelectorAll('.verdict-key .verdict')].map(node => {"
        "const style = getComputedStyle(node); return [style.color, style.backgroundColor]})"
    )
    pairs = browser.execute_script(script)
    assert len(pairs) == 4
    for text, background in pairs:
        low, high = sorted((_luminance(text), _luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
