"""The pages in the folder SITE as a browser shows them: nothing is cut, everything can be reached and read.

`make pages` names the site. Skipped without one, and without Chromium; the rules of axe-core are tried where `make axe`
has fetched it.
"""

import os
from pathlib import Path

import pytest

from tools import browser
from tools.manifest import ROOT

SITE = os.environ.get("SITE")
AXE = ROOT / "out" / "axe" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = sorted(page for page in Path(SITE).absolute().glob("*.html") if page.stem != "search") if SITE else []

pytestmark = [
    pytest.mark.skipif(browser.find() is None, reason="no chromium here: install it to see the pages as readers do"),
    pytest.mark.skipif(not PAGES, reason="SITE names no folder with pages: `make pages` tries those of the site"),
]
each = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)

# Boxes whose content is wider than they are, and which neither scroll nor show that they do.
CUT = """(() => {
  const cut = [], article = document.querySelector("article");
  const scrolls = style => ["auto", "scroll"].includes(style.overflowX);
  for (const box of article.querySelectorAll("*")) {
    const style = getComputedStyle(box);
    if (!box.clientWidth || style.display === "inline") continue;
    if (box.closest("svg, mjx-assistive-mml, mjx-math, .visually-hidden")) continue;
    let outer = box.parentElement;
    while (outer && !scrolls(getComputedStyle(outer))) outer = outer.parentElement;
    if (outer && outer.closest("article")) continue;  // what scrolls is judged itself
    const formula = box.matches("span.math, mjx-container") ? box.querySelector("mjx-math") : null;
    if (box.querySelector("mjx-math") && !formula) continue;  // the formula itself is judged
    const over = (formula ? formula.getBoundingClientRect().width : box.scrollWidth) - box.clientWidth;
    if (over <= 2 || (style.overflowX === "visible" && box.scrollWidth <= article.clientWidth)) continue;
    const edges = parseFloat(style.borderTopWidth) + parseFloat(style.borderBottomWidth);
    if (!scrolls(style) || box.offsetHeight - box.clientHeight - edges < 6)
      cut.push([box.tagName, String(box.className).slice(0, 60), style.overflowX, over, box.textContent.slice(0, 60)]);
  }
  return cut;
})()"""


@pytest.fixture(scope="module")
def tab():
    with browser.Browser() as tab:
        yield tab


@each
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut(tab, page, width):
    tab.open(page, width)
    assert tab.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, (
        "the page itself scrolls sideways"
    )
    assert tab.run(CUT) == []


@each
def test_formulas_fit_the_column_of_a_wide_window(tab, page):
    """What is wider scrolls, as everything does on a telephone; on a desk nobody should have to."""
    tab.open(page, 1280)
    wide = """Array.from(document.querySelectorAll("article mjx-container[display='true']")).map(box =>
      [Math.round(box.querySelector("mjx-math").getBoundingClientRect().width - box.clientWidth),
       box.closest("div.math").id || box.closest("section").id]).filter(([over]) => over > 1)"""
    assert tab.run(wide) == []


@each
@pytest.mark.parametrize("width", [1280, 400])
def test_the_arrow_of_a_closed_box_lies_inside_its_title(tab, page, width):
    tab.open(page, width)
    outside = """Array.from(document.querySelectorAll("article .admonition-title > .toggle-button")).filter(button => {
      const [arrow, title] = [button, button.parentElement].map(box => box.getBoundingClientRect());
      return title.height && (arrow.top < title.top || arrow.bottom > title.bottom || arrow.right > title.right);
    }).map(button => button.parentElement.textContent.trim().slice(0, 60))"""
    assert tab.run(outside) == []


@each
def test_the_keyboard_stops_at_what_can_be_used_and_not_at_formulas(tab, page):
    tab.open(page)
    assert tab.run("document.querySelectorAll('.math [tabindex=\"0\"]:not(.wide)').length") == 0


@each
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious(tab, page, dark):
    if not AXE.is_file():
        pytest.skip("axe-core is not here: `make axe` fetches it with npm")
    tab.open(page, dark=dark)
    tab.run(AXE.read_text(encoding="utf-8") + ";true")
    found = tab.run("axe.run(document, {resultTypes: ['violations']}).then(result => result.violations.map("
                    "v => [v.impact, v.id, v.nodes.length, v.nodes[0].html.slice(0, 200)]))")  # fmt: skip
    assert not [violation for violation in found if violation[0] in ("serious", "critical")]
