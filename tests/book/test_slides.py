"""A deck shows what a lecture needs of a chapter, loads nothing from elsewhere, and fits the screen."""

import re
import shutil

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_output

from tests.book import tiny
from tools import browser, deck, manifest, notebooks, numbers, slides, source
from tools.manifest import ROOT
from tools.plain import Plain

TEXT = """
## The question

Is the sum of {doc}`03-two` right? One more sentence.

This paragraph is said and not shown.
"""
MIDDLE = """
## The middle

Words before. By {prf:ref}`thm-sum`, for i.e. $x.y$ and

$$
a = b .
$$

it holds with $c$ that

$$
a = c
$$ (eq-ac)

for all. Words after, with {eq}`eq-ac`.

### A subsection of $H_a$

:::{prf:proof}
This is proved at home.
:::

And WORDS

$$ d = e $$ (eq-de)

## Nothing to show

Prose alone.

## What to remember

* One thing.
""".replace("WORDS", "word " * 60)
REAL = manifest.load()
NUMBERED = [chapter for chapter in REAL.chapters if chapter.number]
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def book(tmp_path):
    text = (
        TEXT
        + tiny.FIGURE
        + MIDDLE
        + tiny.CLAIM
        + tiny.EXERCISE.replace("An explanation for those who opened it.", tiny.RUBRIC)
    )
    root = tiny.write(
        tmp_path, ("01-one", "One of $H_a$", text), ("03-two", "Two", ""), c03_two={"requires": ["01-one"]}
    )
    shutil.copytree(ROOT / "site" / "slides", root / "site" / "slides")
    return manifest.load(root)


def executed(book, chapter):
    """The chapter with a picture, and with a line printed by every check."""
    notebook = source.read(book, chapter)
    for _, cell in source.code_cells(notebook):
        if "figure" in cell.metadata.get("mystnb", {}):
            cell.outputs = [new_output("display_data", data={"image/png": PIXEL})]
        elif "verifies" in cell.metadata:
            cell.outputs = [new_output("stream", text="error 0.0\n")]
    return notebook


@pytest.fixture
def page(book):
    return slides.page(book, book.chapters[0], executed(book, book.chapters[0]), numbers.of(book))


def texts(page):
    sections = BeautifulSoup(page, "html.parser").select("section section")
    return [" ".join(section.get_text().split()) for section in sections]


def test_what_is_shown(page):
    found = texts(page)
    assert found[0] == "A tiny book 1. One of $H_a$"
    assert found[1] == "The question Is the sum of chapter 3, Two right? One more sentence."
    assert found[2] == "The question Fig. 1.1. A line."
    sentence = r"By Theorem 1.1, for i.e. $x.y$ and $$ a = b . $$ it holds with $c$ that $$ a = c \tag{1.1} $$ for all."
    assert found[3] == f"The middle {sentence}"
    assert found[4] == r"A subsection of $H_a$ $$ d = e \tag{1.2} $$", "of a long sentence the formula alone"
    assert found[5] == "What to remember One thing."
    assert found[6] == "What to remember Theorem 1.1 (Sums). $2 + 2 = 4$"
    assert found[7].startswith("The check of Theorem 1.1 error = abs(")
    assert found[7].endswith("# whole numbers error 0.0")
    assert found[8].startswith("Exercises Exercise 1.1, Twice: 2 points for the code, 3 for the written answer")
    assert len(found) == 9
    assert 'alt="A line from left to right."' in page
    for hidden in ("return 2 * x", "proved at home", "twice(3)", "said and not shown", "Nothing to show"):
        assert hidden not in page


def test_a_chapter_that_was_not_executed_has_no_slides(book):
    with pytest.raises(slides.SlidesError, match=r"01-one was not executed since it, .* run `make slides N=01`"):
        slides.build(book, [book.chapters[0]])


def test_an_appendix_has_no_slides():
    with pytest.raises(slides.SlidesError, match="teaching is an appendix"):
        slides.build(REAL, [REAL.find("teaching")])


@pytest.fixture
def built(book, monkeypatch):
    pytest.importorskip("sphinx_revealjs", reason="no reveal.js here: `make setup` installs it")
    monkeypatch.setattr(notebooks, "is_fresh", lambda book, chapter: True)
    place = notebooks.published(book, book.chapters[0])
    place.parent.mkdir(parents=True)
    place.write_text(nbformat.writes(executed(book, book.chapters[0])), encoding="utf-8")
    (path,) = slides.build(book, [book.chapters[0]])
    return path


def test_everything_a_deck_loads_lies_beside_it(built):
    html = built.read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"([^\"]+)\"", html)
    loaded = [url for url in loaded if not url.startswith("data:image/")]
    assert len(loaded) == 7
    for url in loaded:
        assert (built.parent / url).is_file(), url
    for style in built.parent.rglob("*.css"):
        assert not re.search(r"@import|url\((?!data:)", style.read_text(encoding="utf-8")), style


@pytest.mark.skipif(browser.find() is None, reason="no chromium here: install it to see the slides as a class does")
def test_slides_fit_the_screen(built):
    html = built.read_text(encoding="utf-8")
    long = r"\\".join("a + b" for _ in range(30))
    wide = " + ".join("a" * 8 for _ in range(14))
    more = f"<section><section class='slide'><p>$$\\begin{{aligned}}{long}\\end{{aligned}}$$</p></section>"
    more += f"<section class='slide'><p>word</p><p>$${wide} \\tag{{9.9}}$$</p></section></section>"
    built.write_text(html.replace("</div>\n</div>\n</body>", f"{more}</div></div></body>"), encoding="utf-8")
    with browser.Browser() as tab:
        tab.open(built, 1280, height=720)
        tab.run("(async () => { while (!document.body.dataset.ready) await new Promise(r => setTimeout(r, 20)); })()")
        shown = tab.run("""(async () => {
          const shown = [];
          for (const slide of Reveal.getSlides()) {
            const {h, v} = Reveal.getIndices(slide);
            Reveal.slide(h, v);
            await new Promise(r => setTimeout(r, 30));
            const formula = slide.querySelector("mjx-math")?.getBoundingClientRect();
            shown.push([slide.scrollHeight <= 720, slide.scrollWidth <= slide.clientWidth,
              !formula || formula.right <= innerWidth, slide.style.getPropertyValue("--fit")]);
          }
          return shown;
        })()""")
        formulas = tab.run("document.querySelectorAll('mjx-container').length")
    assert len(shown) == 11
    assert all(all(part[:3]) for part in shown), shown
    assert 0.4 < float(shown[-2][3]) < 1, "a long slide is made smaller"
    assert shown[-1][3] == "", "beside a wide formula the words keep their size"
    assert formulas >= 8


@pytest.mark.parametrize("chapter", NUMBERED, ids=lambda chapter: chapter.slug)
def test_every_chapter_has_a_deck(chapter):
    notebook = source.read(REAL, chapter)
    found = deck.slides(chapter, notebook)
    titles = [slide.title for slide in found]
    assert titles[0] == deck.QUESTION
    assert titles[-2:] == [deck.REMEMBER, "Exercises"]
    assert sum(title.startswith("The check of") for title in titles) == 1
    assert any(slide.is_figure for slide in found[:4]), "a picture of the answer"
    assert 10 <= len(found) <= 45
    render = Plain(numbers.of(REAL))
    for slide in found:
        text = render.text(slide.text)
        assert not re.search(r"\{[\w:]+\}`|^:::", text, re.MULTILINE), text
        words = re.findall(r"[A-Za-z]{2,}", deck.MATH.sub("", deck.DISPLAY.sub("", text)))
        assert len(words) <= 150, f"long for a slide: {text}"
