"""The book on paper: without solutions for students, with them for teachers; numbered pages, whole formulas."""

import re
import shutil
from collections import Counter

import nbformat
import pytest
from nbformat.v4 import new_output

from tests.book import tiny
from tools import browser, edition, manifest, notebooks, pdf, site, source

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WIDE = " + ".join(["a_{long}"] * 60)
SECOND = f"""
## A section of the second

See {{prf:ref}}`thm-sum`, {{eq}}`eq-wide`, {{numref}}`fig-line`, {{cite}}`somebody2020` and {{doc}}`ledger`.

$$
{WIDE}
$$ (eq-wide)

```python
{"long_name_of_a_function(" * 8}
```
"""
LONG = f"1. One{' and one more' * 6}"  # takes two lines
BIB = "@book{somebody2020, author = {Ann Somebody}, title = {Sums}, publisher = {House}, year = {2020}}\n"
SOLUTION = ("return 2 * x", "An explanation for those", "adds the number to itself", "Grader: Twice", "twice(3)")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A small site; its chapters were not executed, but look as if they were."""
    exercise = tiny.EXERCISE.replace("An explanation for those who opened it.", tiny.RUBRIC)
    hidden = tiny.FIGURE.replace("---\nmystnb", "---\ntags: [hide-input]\nmystnb")
    root = tiny.write(
        tmp_path_factory.mktemp("book"),
        (
            "01-one",
            LONG.removeprefix("1. "),
            "\n## A section of the first\n\nThen {doc}`08-eight`.\n" + tiny.CLAIM + hidden + exercise,
        ),
        ("08-eight", "Eight of $H_a$", SECOND),
        c08_eight={"requires": ["01-one"]},
    )
    tiny.install_tools(root)
    (root / "chapters" / "references.bib").write_text(BIB)
    (root / "chapters" / "index.md").write_text("# A tiny book\n\nHome.\n\n## The map\n")
    book = manifest.load(root)
    for chapter in book.chapters:
        notebook = source.read(book, chapter)
        for _, cell in source.code_cells(notebook):
            if "figure" in cell.metadata.get("mystnb", {}):
                cell.outputs = [new_output("display_data", data={"image/png": PIXEL})]
        path = notebooks.published(book, chapter)
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "is_fresh", lambda book, chapter: True)
        patch.setattr(site.ledger, "page", lambda root, entries: "# Ledger\n")  # its rooms are those of the real book
        site.stage(book, root / "out" / "site-src")
    places = ["-c", str(root / "site"), str(root / "out" / "site-src"), str(root / "out" / "html")]
    report = tiny.run(root, "sphinx", "-q", "-b", "html", *places)
    assert report.returncode == 0, report.stderr
    return book


def composed(book, kind, chosen=None):
    folder = book.root / "out" / "html"
    return edition.document(book, folder, chosen or edition.names(folder, book), kind)


def words(document):
    return " ".join(document.body.get_text().split())


def test_students_get_no_solution_and_teachers_do(book):
    student, instructor = (words(composed(book, kind)) for kind in ("student", "instructor"))
    for text in SOLUTION:
        assert text not in student
        assert text in instructor
    for text in ("Double a number.", "raise NotImplementedError()", "error = abs(", "A line.", "Theorem 1.1"):
        assert text in student
        assert text in instructor
    for text in ("plt.subplots()", "Show the code", "Hide the code"):  # the code of figures
        assert text not in student + instructor
    assert "Instructor's edition" in instructor
    assert "The map" not in student + instructor, "a heading of a list of pages, which is left out"


@pytest.mark.parametrize("kind", sorted(edition.EDITIONS))
def test_every_link_leads_to_one_place(book, kind):
    made = composed(book, kind)
    names = Counter(tag["id"] for tag in made.find_all(id=True))
    assert max(names.values()) == 1
    targets = [link["href"] for link in made.body.find_all("a", href=True)]
    inside = {target[1:] for target in targets if target.startswith("#")}
    assert inside <= set(names)
    assert any(name.startswith("01-one--") for name in inside & set(names))
    assert not [target for target in targets if target.endswith(".html")], "the ledger is not in it"
    loaded = [tag.get("src") or tag.get("href") for tag in made.find_all(["script", "link", "img"])]
    assert all(address.startswith("file:") for address in filter(None, loaded))


def test_a_link_shows_the_formula_of_a_title(book):
    (link,) = composed(book, "student").select('a[href="#08-eight"]')
    assert link.get_text() == r"Eight of \(H_a\)"
    assert link.find("span", class_="math")


def test_a_chapter_alone_links_to_no_other(book):
    made = composed(book, "student", ["08-eight"])
    assert "See Theorem 1.1, (8.1), Fig. 1.1" in words(made)
    assert not [link for link in made.body.find_all("a") if link.get("href", "").startswith("#01-one")]
    assert "Contents" not in words(made)


def test_a_book_is_printed_until_its_contents_are_right_and_not_for_ever():
    prints = []

    def attempt(pages):
        """The contents get longer once they have numbers."""
        prints.append(pages)
        return {"a": 2 + bool(pages)}

    assert pdf.settled(attempt) == {"a": 3}
    assert prints == [{}, {"a": 2}, {"a": 3}]
    assert pdf.settled(lambda pages: {}) == {}
    with pytest.raises(pdf.PdfError, match=r"printed 5 times, .* other pages .* make pdf N=02"):
        pdf.settled(lambda pages: {"a": 1 + pages.get("a", 0) % 2})


@pytest.fixture(scope="module")
def printed(book):
    """Text of the pages, by edition."""
    if browser.find() is None:
        pytest.skip("no chromium here: install it to print the book")
    pypdf = pytest.importorskip("pypdf", reason="pypdf is not installed here: `make setup` installs it")
    readers = {kind: pypdf.PdfReader(pdf.build(book, kind)) for kind in edition.EDITIONS}
    return readers


def test_solutions_are_not_in_the_students_pdf(printed):
    text = {kind: " ".join(page.extract_text() for page in reader.pages) for kind, reader in printed.items()}
    text = {kind: re.sub(r"\s+", " ", printed) for kind, printed in text.items()}
    assert "return 2 * x" in text["instructor"]
    assert "adds the number to itself" in text["instructor"]
    for solution in SOLUTION:
        assert solution not in text["student"]
    assert "Double a number." in text["student"]


def test_pages_are_numbered_and_the_contents_name_them(printed):
    pages = [page.extract_text().replace("\ufb01", "fi") for page in printed["student"].pages]
    assert len(pages) >= 5
    for number, text in enumerate(pages, start=1):
        assert re.search(rf"^{number}$|A tiny book\s*{number}\b", text, re.MULTILINE), f"page {number} has no number"
    contents = next(text for text in pages if "Contents" in text)
    numbers = {title: int(number) for title, number in re.findall(r"(A section of the \w+)\s*(\d+)$", contents, re.M)}
    assert len(numbers) == 2
    for title, number in numbers.items():
        assert title in pages[number - 1]
    assert any(len(page.images) for page in printed["student"].pages), "the figure is there"
    outline = printed["student"].outline  # what a reader on a screen has beside the pages
    titles = [item.title for item in outline if not isinstance(item, list)]
    assert titles == ["A tiny book", "A tiny book", LONG, r"8. Eight of H_a", "Bibliography"]


def test_nothing_is_wider_than_the_paper(book, printed, tmp_path):
    html = tmp_path / "book.html"
    html.write_text(str(composed(book, "student")), encoding="utf-8")
    with browser.Browser() as tab:
        tab.open(html, pdf.WIDTH, media="print")
        over = """Math.max(...Array.from(document.querySelectorAll("mjx-math, pre *, table"),
          (box) => box.getBoundingClientRect().right)) - document.documentElement.clientWidth"""
        assert tab.run(over) > 100, "before it is made to fit"
        assert tab.run(pdf.FIT) == []
        assert tab.run(over) <= 0
        tab.run("document.querySelector('mjx-container').remove()")
        assert "a formula that is not set" in tab.run(pdf.FIT)[0]


def test_what_is_missing_is_said(book, tmp_path):
    empty = manifest.load(tiny.write(tmp_path, ("01-one", LONG.removeprefix("1. "), "")))
    with pytest.raises(pdf.PdfError, match="There is no site to print: `make book` builds it"):
        pdf.folder_of(empty, None)
    with pytest.raises(pdf.PdfError, match="01-one has no page to print: `make chapter N=01` builds it"):
        pdf.folder_of(empty, empty.chapters[0])
    shutil.copytree(book.root / "out" / "html", tmp_path / "out" / "html")
    assert pdf.folder_of(empty, None) == tmp_path / "out" / "html"
    (tmp_path / "out" / "html" / site.INCOMPLETE).touch()
    with pytest.raises(pdf.PdfError, match="Chapters of the site have no results"):
        pdf.folder_of(empty, None)
    assert pdf.outdated(empty, tmp_path / "out" / "html", empty.chapters) == list(empty.chapters)
