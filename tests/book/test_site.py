"""The site shows chapter numbers, stubs and the ledger, loads nothing from outside, and survives a failed build."""

import re
import runpy

import pytest

from tests.book import tiny
from tools import ledger, manifest, notebooks, site
from tools.manifest import ROOT

REFERENCES = """
See {prf:ref}`thm-sum`, {ref}`ex-twice`, {eq}`eq-four`, {numref}`fig-line` and {cite}`somebody2020`.

:::{prf:lemma} Four
:label: lem-four
$4 = 4$
:::

$$ 2 + 2 = 4 $$ (eq-four)

```{code-cell} ipython3
---
tags: [hide-input]
mystnb:
  figure:
    name: fig-line
    caption: A line.
  image:
    alt: A line from left to right.
---
import matplotlib.pyplot as plt
fig, ax = plt.subplots()
ax.plot([0, 1])
plt.show()
```

```{code-cell} ipython3
import torch
from kfqn_core.maths.algebra import kron_matvec

two = torch.tensor([[2.0]])
```

```{code-cell} ipython3
---
verifies: lem-four
room: maths.algebra.kron_matvec
test: tests/test_algebra.py::test_sum
broken_by: "kron_matvec = lambda A, G, V: A"
---
assert kron_matvec(two, two / 2, two).item() == 2 + 2
```

```{code-cell} ipython3
from IPython.display import Markdown
Markdown("| sum | value |\\n|---|---|\\n| two and two | four |")
```
"""
BIBLIOGRAPHY = "@book{somebody2020, author = {Ann Somebody}, title = {Sums}, publisher = {House}, year = {2020}}\n"


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Two executed chapters, 01 and 08, and everything the site is made of."""
    root = tmp_path_factory.mktemp("book")
    tiny.write(
        root,
        ("01-one", "One", tiny.CLAIM + tiny.EXERCISE),
        ("08-eight", "Eight", REFERENCES),
        c08_eight={"requires": ["01-one"]},
    )
    tiny.install_tools(root)
    (root / "chapters" / "references.bib").write_text(BIBLIOGRAPHY)
    (root / "chapters" / "index.md").write_text("# A tiny book\n\nHome.\n")
    (root / "chapters" / "untitled.md").write_text("somebody's notes, listed nowhere\n")
    report = tiny.run(root, "pytest", "--nbmake", "chapters", MPLBACKEND="Agg")  # as in the shell of a cluster
    assert report.returncode == 0, report.stdout
    report = tiny.run(root, "tools.site", MPLBACKEND="Agg")
    assert report.returncode == 0, report.stderr
    assert "chapters/untitled.md is not listed in book.toml, and was left out" in report.stdout
    assert str(root / "out" / "html" / "index.html") in report.stdout
    return manifest.load(root)


@pytest.fixture(scope="module")
def html(book):
    pages = (book.root / "out" / "html").glob("*.html")
    return {page.stem: page.read_text(encoding="utf-8") for page in pages}


def text_of(page):
    """The words of a page's article."""
    article = page.partition("<article")[2].partition("</article>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", article))


def test_numbers_are_those_of_the_chapters(html):
    text = text_of(html["08-eight"])
    assert "8. Eight" in text
    assert "See Theorem 1.1, Exercise 1.1, (8.1), Fig. 8.1 and [Somebody, 2020]." in text
    assert "Lemma 8.1 (Four)" in text
    assert "Fig. 8.1 A line." in text
    assert 'alt="A line from left to right."' in html["08-eight"]
    assert "untitled" not in html
    assert "Builds on One." in text


def test_a_table_that_a_cell_displays_is_a_table(html):
    assert re.search(r"<td[^>]*>(<p>)?two and two", html["08-eight"])


def test_exercise_shows_the_stub_and_hides_the_solution(html):
    page = html["01-one"]
    task, _, solution = page.partition('class="solution')
    assert "raise" in task.partition("Double a number.")[2], "the stub stands in the box of the task"
    assert "return" not in task.partition("Double a number.")[2]
    assert 'class="solution dropdown' in page, "closed until a reader opens it"
    assert "An explanation for those who opened it." in solution
    assert "BEGIN SOLUTION" not in page


def test_the_ledger_links_claim_check_room_and_test(html):
    text = text_of(html["ledger"])
    assert "Theorem 1.1: Sums chapter 1, cell 2 maths.algebra.kron_matvec test_sum" in text
    assert "Lemma 8.1: Four chapter 8, cell 3 maths.algebra.kron_matvec test_sum" in text
    assert "return G @ V @ A.mT" in text
    for target in re.findall(r'href="(0[18]-\w+\.html)#(check-[\w-]+)"', html["ledger"]):
        assert f'id="{target[1]}"' in html[target[0].removesuffix(".html")]
    assert 'href="01-one.html#check-01-one-2"' in html["ledger"]


def test_nothing_is_loaded_from_outside(html):
    for name, page in html.items():
        loaded = re.findall(r"<(?:script|img|iframe|link)[^>]*(?:src|href)=\"([^\"]+)\"[^>]*>", page)
        assert not [url for url in loaded if url.startswith(("http", "//"))], name


def test_the_notebook_offered_is_the_one_that_ran(book):
    for chapter in book.chapters:
        offered = book.root / "out" / "html" / "_sources" / f"{chapter.slug}.ipynb"
        assert offered.read_bytes() == notebooks.published(book, chapter).read_bytes()


def test_a_failed_build_leaves_the_last_good_site(book):
    home, index = book.src / "index.md", book.root / "out" / "html" / "index.html"
    text, good = home.read_text(), index.read_bytes()
    home.write_text(text + "\nSee {doc}`no-such-chapter`.\n")
    report = tiny.run(book.root, "tools.site")
    home.write_text(text)
    assert report.returncode == 1
    assert "no-such-chapter" in report.stderr
    assert "the last good one, if any, is untouched" in report.stderr
    assert index.read_bytes() == good


def test_a_changed_chapter_is_not_shown_unexecuted(book, tmp_path):
    chapter = book.chapters[1]
    text = chapter.path.read_text()
    chapter.path.write_text(text + "\nOne more line.\n")
    with pytest.raises(site.SiteError, match="08-eight was not executed since it, or the code it stands on, changed"):
        site.stage(book, tmp_path / "staged")
    chapter.path.write_text(text)


def test_a_gap_in_the_ledger_stops_the_site(tmp_path):
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", tiny.CLAIM.replace("thm-sum\n", "thm-add\n", 1))))
    with pytest.raises(site.SiteError, match="claim thm-add has no check"):
        site.stage(book, tmp_path / "staged")


def test_every_room_and_test_of_the_real_ledger_has_a_listing():
    page = ledger.page(ROOT, ledger.collect(manifest.load()))
    assert set(re.findall(r"<(room-[^>]+|test-[^>]+)>`", page)) == set(
        re.findall(r"^\((room-.+|test-.+)\)=", page, re.M)
    )


def test_the_docstring_of_a_property_may_have_a_colon():
    from sphinx.ext.napoleon import GoogleDocstring

    settings = runpy.run_path(str(ROOT / "site" / "conf.py"))
    lines = ["Layers by name: parameters and `A`."]
    settings["as_rst"](None, "property", "KFQN.layers", None, None, lines)
    page = str(GoogleDocstring(lines, what="property", name="layers"))
    assert ":type:" not in page
    assert "Layers by name: parameters and ``A``." in page


def test_a_line_does_not_begin_with_the_punctuation_after_a_formula():
    from docutils import nodes

    settings = runpy.run_path(str(ROOT / "site" / "conf.py"))
    words = nodes.Text("by "), nodes.math("", "x"), nodes.Text("), and "), nodes.math("", "y"), nodes.Text(" too")
    paragraph = nodes.paragraph("", "", *words)
    settings["formulas_keep_punctuation"](None, paragraph, "page")
    assert [child.astext() for child in paragraph] == ["by ", "x),", " and ", "y", " too"]
    assert paragraph[1]["classes"] == ["together"]
