"""A chapter that fails, or was never executed, costs its own page and no other."""

import re

import pytest

from tests.book import tiny
from tools import gaps, manifest, notebooks
from tools.source import ChapterError

REFERENCES = "See {prf:ref}`thm-sum`, {numref}`fig-line` and {doc}`03-three`.\n"
FAILS = tiny.code("print('so far')") + tiny.code("1 / 0") + tiny.FIGURE


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three chapters: one that runs and refers to the second, one that fails before its figure, one that waits."""
    root = tmp_path_factory.mktemp("book")
    tiny.write(
        root, ("01-one", "One", REFERENCES + tiny.CLAIM), ("02-two", "$H_g$ fails", FAILS), ("03-three", "3", "")
    )
    tiny.install_tools(root)
    (root / "chapters" / "references.bib").touch()
    (root / "chapters" / "index.md").write_text("# A tiny book\n\nHome.\n")
    report = tiny.run(root, "pytest", "--nbmake", "chapters/01-one.md", "chapters/02-two.md")
    assert "1 failed, 1 passed" in report.stdout
    return root


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_a_fresh_machine_gets_a_site_with_the_failure_marked(root):
    assert tiny.run(root, "tools.site").returncode == 1, "the whole site needs every chapter"
    report = tiny.run(root, "tools.site", "--after-failure")
    assert report.returncode == 0, report.stderr
    assert "02 H_g fails: 02-two, code cell 2 (1 / 0): ZeroDivisionError: division by zero" in report.stdout
    assert "03 3: not executed" in report.stdout
    assert f"The book:  {(root / 'out' / 'html' / 'index.html').as_uri()}" in report.stdout

    html = root / "out" / "html"
    two = words(html / "02-two.html")
    assert "This chapter failed on this machine" in two
    assert two.count("02-two, code cell 2 (1 / 0): ZeroDivisionError: division by zero") == 1
    assert "so far" in two
    assert "Fig. 2.1 A line." in two
    assert "See Theorem 1.1, Fig. 2.1 and 3." in words(html / "01-one.html")
    assert "error 0" in words(html / "01-one.html")
    assert "was not executed here" not in words(html / "01-one.html")
    assert "This chapter was not executed here" in words(html / "03-three.html")
    assert "make chapter N=03 or make book" in words(html / "03-three.html")


def test_a_whole_site_is_left_alone(root):
    html = root / "out" / "html"
    (html / ".incomplete").unlink(missing_ok=True)
    html.mkdir(exist_ok=True)
    report = tiny.run(root, "tools.site", "--after-failure")
    assert report.returncode == 0
    assert "The last good notebooks and site are untouched" in report.stdout
    assert not (html / ".incomplete").exists()


def test_one_page_alone_names_the_others(root):
    report = tiny.run(root, "tools.site", "--only", "1")
    assert report.returncode == 0, report.stderr
    page = root / "out" / "chapter" / "01-one.html"
    assert f"The page:  {page.as_uri()}" in report.stdout
    assert "show their code without results: 2, 3. make book makes them all." in words(page)
    report = tiny.run(root, "tools.site", "--only", "12")
    assert report.returncode == 1
    assert "There is no chapter '12'; there are 01, 02, 03." in report.stderr


def test_a_failure_is_forgotten_with_the_text_that_failed(tmp_path):
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", FAILS)))
    (chapter,) = book.chapters
    with pytest.raises(ChapterError):
        notebooks.execute(book, chapter)
    assert notebooks.failure(book, chapter).endswith("ZeroDivisionError: division by zero")
    assert "failed on this machine" in gaps.note(book, chapter)
    chapter.path.write_text(chapter.path.read_text().replace("1 / 0", "1 / 1"))
    assert notebooks.failure(book, chapter) is None
    assert "was not executed here" in gaps.note(book, chapter)
    assert notebooks.execute(book, chapter)
    assert not notebooks.running(book, chapter).exists()


def test_an_appendix_that_is_to_be_executed_is_called_by_its_name(tmp_path):
    book = manifest.load(tiny.write(tmp_path, ("notation", "Notation", "\nWords.\n"), cnotation={"tier": "appendix"}))
    assert "1 of 1 chapters (notation)" in notebooks.outlook(book, book.chapters)


def test_a_reader_sees_how_far_a_chapter_is(tmp_path, monkeypatch):
    book = manifest.load(tiny.write(tmp_path, ("08-one", "One of $H_g$", tiny.CLAIM + tiny.EXERCISE)))
    (chapter,) = book.chapters
    assert notebooks.outlook(book, book.chapters).startswith("To execute: 1 of 1 chapters (08). Their budgets")
    said = []
    monkeypatch.setattr(notebooks, "EVERY_S", 1000)
    notebooks.execute(book, chapter, said.append)
    (line,) = said  # the first cell's: not one for each
    assert re.fullmatch(r"08 One of H_g: cell 1/4, \d+:\d\d", line)
    assert notebooks.outlook(book, book.chapters).startswith("Nothing to execute")
    monkeypatch.setattr(notebooks, "EVERY_S", 0)
    said.clear()
    notebooks.execute(book, chapter, said.append)
    cells = [line.partition(": ")[2].rpartition(",")[0] for line in said]
    trials = [f"trying checks and graders, {i}/3" for i in (1, 2, 3)]
    assert cells == [f"cell {i}/4" for i in (1, 2, 3, 4)] + trials


def test_progress_passes_the_capture_of_pytest_and_of_its_workers(tmp_path):
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", tiny.CLAIM)))
    report = tiny.run(root, "pytest", "-v", "-n", "1", "--nbmake", "chapters")
    assert report.returncode == 0, report.stdout
    assert "01 One: cell 1/2, " in report.stderr
