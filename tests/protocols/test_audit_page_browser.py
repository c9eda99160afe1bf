"""The page in a real browser: it asks for nothing, complains of nothing, and can be read wherever it is shown."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import reports

from farfield.protocols.audit.page import page

pytestmark = pytest.mark.browser

Show: TypeAlias = Callable[..., AbstractContextManager[Any]]

PHONE, DESKTOP = (360, 740), (1280, 900)

CONTRASTS = """
() => {
  const parse = (text) => {
    const found = text.match(/rgba?\\(([^)]*)\\)/);
    if (!found) return null;
    const parts = found[1].split(',').map(Number);
    return { rgb: parts.slice(0, 3), alpha: parts.length > 3 ? parts[3] : 1 };
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((v) => {
      const c = v / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour && colour.alpha === 1) return colour.rgb;
    }
    return null;
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.data.trim() || ['TITLE', 'DESC', 'STYLE'].includes(element.tagName.toUpperCase())) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
    found.push(['text', node.data.trim().slice(0, 40), ratio(ink.rgb, behind(element))]);
  }
  const drawn = [['stroke', '.line, .whisker, .claim, .mark, .chance'], ['fill', '.bar, .marker']];
  for (const [paint, kinds] of drawn) {
    for (const element of document.querySelectorAll(kinds)) {
      const ink = parse(getComputedStyle(element)[paint]);
      found.push(['line', element.getAttribute('class'), ratio(ink.rgb, behind(element))]);
    }
  }
  return found;
}
"""

OVERLAPS = """
() => {
  const found = [];
  for (const image of document.querySelectorAll('svg.plot')) {
    const frame = image.getBoundingClientRect();
    const texts = [...image.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
    for (const [words, box] of texts) {
      const across = box.left < frame.left - 1 || box.right > frame.right + 1;
      if (across || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) found.push([words, 'leaves its drawing']);
    }
    texts.forEach(([one, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > a.height / 3) found.push([one, other]);
    }));
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = [one for one in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if one]
    assert found, "no Chromium on this machine: install one (on Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found[0])
        yield started
        started.close()


@pytest.fixture(params=["private.toml", "quickstart.toml"])
def show(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Show:
    """Opens the page of a rich report, and closes it if it asked for nothing and complained of nothing."""
    file = tmp_path / "report.html"
    file.write_text(page(reports.report(request.param), reports.PUBLIC), encoding="utf-8")

    @contextmanager
    def opened(size: tuple[int, int], scheme: str = "light", media: str = "screen") -> Iterator[Any]:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        view = context.new_page()
        complaints: list[str] = []
        requests: list[str] = []
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.on("request", lambda asked: requests.append(asked.url))
        view.emulate_media(media=media)
        view.goto(file.as_uri())
        yield view
        context.close()
        assert complaints == [] and requests == [file.as_uri()]

    return opened


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_nothing_is_wider_than_the_screen(show: Show, size: tuple[int, int]) -> None:
    with show(size) as view:
        assert view.evaluate("document.documentElement.scrollWidth") == size[0]
        assert view.evaluate("innerWidth") == size[0]


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_every_drawing_can_be_seen(show: Show, size: tuple[int, int]) -> None:
    with show(size) as view:
        plots = view.locator("svg.plot").all()
        assert len(plots) == 6  # one of each kind, and the chart of bounds
        for plot in plots:
            box = plot.bounding_box()
            assert plot.is_visible() and box["width"] > 280 and box["height"] > 100
        for swatch in view.locator("svg.swatch").all():
            assert swatch.is_visible() and swatch.bounding_box()["width"] > 20
        assert view.locator("svg .line").count() > 10  # seen by its box, which a path without points has not
        boxes = view.evaluate("[...document.querySelectorAll('svg .line')].map((one) => one.getBBox().width)")
        assert min(boxes) > 20


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_no_label_lies_on_another(show: Show, size: tuple[int, int]) -> None:
    with show(size) as view:
        assert view.evaluate(OVERLAPS) == []


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_the_text_of_a_drawing_is_large_enough_to_be_read(show: Show, size: tuple[int, int]) -> None:
    script = "[...document.querySelectorAll('svg.plot text')].map((one) => parseFloat(getComputedStyle(one).fontSize)"
    with show(size) as view:
        shown = view.evaluate(f"{script} * one.getScreenCTM().a)")
        assert min(shown) > 9.5 and max(shown) < 18


@pytest.mark.parametrize(("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("dark", "print")])
def test_contrast_is_that_of_level_aa(show: Show, scheme: str, media: str) -> None:
    with show(DESKTOP, scheme, media) as view:
        found = view.evaluate(CONTRASTS)
        assert len([one for one in found if one[0] == "text"]) > 150
        assert [one for one in found if one[2] < (4.5 if one[0] == "text" else 3)] == []
        light = view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (scheme == "light" or media == "print")


def test_who_hears_the_page_gets_tables_and_drawings(show: Show) -> None:
    for size in (PHONE, DESKTOP):
        with show(size) as view:
            tables = view.get_by_role("table")
            assert tables.count() == 5  # four of figures, which a telephone shows as lists, and one of cells
            assert view.get_by_role("rowheader", name="Area under the curve").count() == 1
            assert view.get_by_role("img", name="Exposure after each round").count() == 1
            assert view.get_by_role("heading", level=1).count() == 1
            levels = view.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map((one) => +one.tagName[1])")
            assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_every_link_leads_somewhere(show: Show) -> None:
    with show(DESKTOP) as view:
        for link in view.locator("a").all():
            link.click()
            assert view.evaluate("document.querySelector(':target') !== null"), link.get_attribute("href")


def test_it_can_be_printed(show: Show) -> None:
    with show(DESKTOP) as view:
        view.emulate_media(media="print")
        assert not view.locator("details").is_visible()
        raw = view.pdf(format="A4")
        assert raw.startswith(b"%PDF-") and 4 <= raw.count(b"/Type /Page\n") <= 14
