"""JupyterLab shows what the site closes closed, under the numbers of the site; saving changes what was changed."""

import re
import shutil

import nbformat
import pytest
from traitlets.config import PyFileConfigLoader

from tests.book import tiny
from tools import lab, manifest, view
from tools.manifest import ROOT

BOOK = manifest.read()
BIB = "@book{some2020, author = {Ann Somebody}, title = {Sums}, publisher = {House}, year = {2020}, doi = {10.1/x}}\n"
SECOND = """
:::{prf:lemma} Four
:label: lem-four
$4 = 4$
:::

:::{prf:proof}
By {prf:ref}`lem-four`, {prf:ref}`thm-sum` and {ref}`the exercise
<ex-twice>`.
:::

$$
4 = 4
$$ (eq-four)

See {eq}`eq-four`, {numref}`fig-line`, {doc}`01-one`, {doc}`this <01-one>`, {cite}`some2020` and {doc}`ledger`;
`{eq}` stays.

```python
:::{prf:theorem} in code, with {eq}`eq-four`
```
"""


@pytest.fixture
def contents(tmp_path):
    for chapter in BOOK.chapters:
        shutil.copy(chapter.path, tmp_path)
    shutil.copy(BOOK.src / "jupytext.toml", tmp_path)
    return lab.Chapters(root_dir=str(tmp_path))


@pytest.mark.parametrize("chapter", BOOK.chapters, ids=lambda chapter: chapter.slug)
def test_saving_changes_nothing(contents, tmp_path, chapter):
    name = chapter.path.name
    model = contents.get(name, type="notebook")
    content = nbformat.reads(nbformat.writes(nbformat.from_dict(model["content"])), as_version=4)  # over the wire
    content["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"  # as JupyterLab does
    content["metadata"]["language_info"] = {"name": "python", "version": "3.12.1"}
    shown = "\n".join(cell["source"] for cell in content["cells"] if cell["cell_type"] == "markdown")
    left = [text for text in re.findall(r"(?<![`\"])\{[\w:]+\}`[^`]+`(?!\")", shown) if "ledger" not in text]
    assert not left, "references that JupyterLab cannot resolve"
    contents.save({"type": "notebook", "format": "json", "content": content}, name)
    assert (tmp_path / name).read_text() == chapter.path.read_text()


def test_a_change_is_saved_and_nothing_else(contents, tmp_path):
    name = BOOK.chapters[0].path.name
    content = contents.get(name, type="notebook")["content"]
    cell = next(cell for cell in content["cells"] if ":::{prf:theorem}" in cell["source"])
    first = re.search(r"\[Theorem [\d.]+\]\(\S+ \"(\{prf:ref\}`[\w-]+`)\"\)", str(content["cells"]))
    cell["source"] = cell["source"].replace(":::{prf:theorem}", f"As {first[0]} says.\n\n:::{{prf:theorem}}", 1)
    contents.save({"type": "notebook", "format": "json", "content": content}, name)
    before, after = BOOK.chapters[0].path.read_text(), (tmp_path / name).read_text()
    assert after == before.replace(":::{prf:theorem}", f"As {first[1]} says.\n\n:::{{prf:theorem}}", 1)


@pytest.fixture
def book(tmp_path):
    root = tiny.write(
        tmp_path, ("01-one", "One", tiny.CLAIM + tiny.EXERCISE + tiny.FIGURE), ("08-two", "Two of $H_a$", SECOND)
    )
    (root / "chapters" / "references.bib").write_text(BIB)
    return manifest.load(root)


def shown(book, slug):
    chapter = book.find(slug)
    manager = lab.Chapters(root_dir=str(book.src))
    content = manager.get(chapter.path.name, type="notebook")["content"]
    return content["cells"]


@pytest.fixture
def cells(book, monkeypatch):
    monkeypatch.setattr(lab.manifest, "read", lambda: book)
    return {slug: shown(book, slug) for slug in ("01-one", "08-two")}


def test_what_the_site_closes_is_closed(cells):
    assert cells["01-one"][0]["source"] == lab.LINE
    closed = [cell["metadata"].get("jupyter") for cell in cells["01-one"] if cell["cell_type"] == "code"]
    assert closed == [None, None, {"source_hidden": True}, {"source_hidden": True}, None]  # the solution, the grader


def test_numbers_and_links_are_those_of_the_site(cells):
    text = "\n".join(cell["source"] for cell in cells["08-two"])
    assert ":::{prf:lemma} Four\n:enumerator: 8.1\n:label: lem-four\n" in text
    assert ":::{prf:proof}\n:enumerated: false\n" in text
    assert '[Lemma 8.1](#lem-four "{prf:ref}`lem-four`")' in text
    one = {cell["id"]: cell["source"] for cell in cells["01-one"]}
    link = re.search(r"\[Theorem 1.1\]\(01-one.md#cell-id=(\S+) \"\{prf:ref\}`thm-sum`\"\)", text)
    assert ":::{prf:theorem} Sums" in one[link[1]], "it leads to the cell that states the theorem"
    assert re.search(r'\[the exercise\]\(01-one.md#cell-id=\S+ "{ref}`the exercise\n<ex-twice>`"\)', text)
    assert "4 = 4\n\\tag{8.1}$$ (eq-four)" in text
    assert '[(8.1)](#eq-four "{eq}`eq-four`")' in text
    link = re.search(r"\[Fig. 1.1\]\(01-one.md#cell-id=(\S+) ", text)
    assert "plt.show()" in one[link[1]]
    assert '[One](01-one.md "{doc}`01-one`"), [this](01-one.md "{doc}`this <01-one>`")' in text
    assert '[(Somebody, 2020)](https://doi.org/10.1/x "{cite}`some2020`")' in text
    assert "{doc}`ledger`;\n`{eq}` stays" in text
    assert ":::{prf:theorem} in code, with {eq}`eq-four`" in text
    assert "*Fig. 1.1.* A line." in one.values()
    assert "% :::{solution-end}\n% :::" in one.values()


def test_what_is_shown_is_written_as_it_was(book, cells):
    seen = view.of(book)
    assert view.written(seen.shown(book.chapters[1], SECOND)) == SECOND
    assert view.written(seen.shown(None, SECOND)) == SECOND


def test_a_book_that_cannot_be_read_still_opens(book, monkeypatch):
    def unreadable():
        raise manifest.ManifestError("book.toml: title: missing")

    monkeypatch.setattr(lab.manifest, "read", unreadable)
    cells = shown(book, "01-one")
    assert "book.toml: title: missing" in cells[0]["source"]
    assert any("{solution-end}" in cell["source"] for cell in cells)


def test_jupyter_reads_the_settings():
    settings = PyFileConfigLoader("lab.py", path=str(ROOT / "tools")).load_config()
    assert settings.ServerApp.contents_manager_class.__name__ == "Chapters"
