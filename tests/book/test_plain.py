"""Students' Markdown: what MyST alone understands is written out, with the numbers of the site."""

import json
import re

import pytest

from tests.book import tiny
from tools import assignment, manifest, numbers, source
from tools.plain import Plain

BIB = """@article{ren2021, author = {Ren, Yi and Goldfarb, Donald}, title = {On {K}-factors}, year = {2021}}
@article{one2020, author = {Van Loan, Charles}, title = {Alone}, year = {2020}}
@article{three2019, author = {A, B and C, D and E, F}, title = {Three}, year = {2019}}
"""
FIRST = """
:::{prf:definition} A thing
:label: def-thing
It is.
:::

:::{prf:lemma}
:label: lem-first
One.
:::

$$
a = b
$$ (eq-ab)

:::{prf:theorem} Sums
:label: thm-two
$2 + 2 = 4$ by {eq}`eq-ab`.
:::

:::{prf:proof}
See {prf:ref}`lem-first`, {numref}`fig-line` and {ref}`ex-twice`.

$$
c = d
$$ (eq-cd)
:::
"""
SECOND = """
{prf:ref}`thm-two`, {eq}`eq-cd`; {doc}`01-one` and {doc}`this <01-one>`; {cite}`ren2021,three2019`, {cite:t}`ren2021`
and {cite}`one2020`. In code, `{eq}` stays, and

```python
:::{prf:theorem} not a box
```

:::{warning}
Careful.
:::
"""


@pytest.fixture
def book(tmp_path):
    root = tiny.write(tmp_path, ("01-one", "One", FIRST + tiny.FIGURE + tiny.EXERCISE), ("03-two", "Two", SECOND))
    (root / "chapters" / "references.bib").write_text(BIB)
    return manifest.load(root)


def plain(book, slug):
    chapter = next(chapter for chapter in book.chapters if chapter.slug == slug)
    notebook = assignment.reading(book, chapter, numbers.of(book), wheel=None)
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_boxes_equations_and_captions(book):
    text = plain(book, "01-one")
    assert text.startswith("# Chapter 1: One")
    assert "**Definition 1.1 (A thing).**\n\nIt is." in text
    assert "**Lemma 1.1.**\n\nOne." in text
    assert "**Theorem 1.2 (Sums).**\n\n$2 + 2 = 4$ by (1.1)." in text
    assert "*Proof.*\nSee Lemma 1.1, Fig. 1.1 and Exercise 1.1." in text
    assert "a = b\n\\tag{1.1} $$" in text
    assert "c = d\n\\tag{1.2} $$" in text
    assert "∎" in text
    assert "*Fig. 1.1.* A line." in text
    assert "Double a number" not in text  # exercises have a notebook of their own


def test_references_across_chapters_and_citations(book):
    text = plain(book, "03-two")
    assert "Theorem 1.2, (1.2); chapter 1, *One* and this; (Ren and Goldfarb, 2021; A et al., 2019), " in text
    assert "Ren and Goldfarb (2021)\nand (Van Loan, 2020). In code, `{eq}` stays" in text
    assert ":::{prf:theorem} not a box" in text  # inside a fence
    assert "**Warning.**\n\nCareful." in text
    assert "* Van Loan (2020): *Alone*" in text


def test_a_renderer_without_numbers_keeps_the_label():
    nothing = numbers.Numbers({}, {}, {}, {})
    assert Plain(nothing).text("see {eq}`eq-gone`") == "see eq-gone"


def test_the_numbers_are_those_of_sphinx(book, tmp_path):
    """Build the pages with the site's own settings, and read the numbers off them."""
    staged = tmp_path / "staged"
    staged.mkdir()
    for chapter in book.chapters:
        notebook = source.read(book, chapter)
        for _, cell in source.code_cells(notebook):
            picture = [{"output_type": "display_data", "data": {"image/svg+xml": "<svg/>"}, "metadata": {}}]
            cell.outputs = picture if "figure" in cell.metadata.get("mystnb", {}) else []
        (staged / f"{chapter.slug}.ipynb").write_text(json.dumps(notebook))
    (staged / "index.md").write_text("# Home\n\n```{toctree}\n:numbered: 2\n\n01-one\n03-two\n```\n")
    root = tiny.install_tools(book.root)
    report = tiny.run(root, "sphinx", "-q", "-b", "html", "-c", str(root / "site"), str(staged), str(tmp_path / "html"))
    assert report.returncode == 0, report.stderr
    page = re.sub(r"<[^>]+>", "", (tmp_path / "html" / "01-one.html").read_text())
    for name in numbers.of(book).labels.values():
        assert name in page, name
