"""Everything that can be wrong with book.toml is one error that names the file and the key."""

import shutil
import subprocess

import pytest

from tests.book import tiny
from tools import manifest

ONE = tiny.entry("01-one", "One")


def book_toml(listing):
    return tiny.BOOK + '\n[[part]]\ntitle = "Part one"\n\n' + listing


def test_the_real_book_loads():
    book = manifest.load()
    assert [chapter.number for chapter in book.chapters if chapter.number] == sorted(
        chapter.number for chapter in book.chapters if chapter.number
    )
    assert all(chapter.path.is_file() for chapter in book.chapters)


def test_values_and_defaults(tmp_path):
    more = tiny.entry("02-two", "Two", budget_s=7, device="gpu", requires=["01-one"])
    (tmp_path / "book.toml").write_text(book_toml(ONE + more))
    one, two = manifest.read(tmp_path).chapters
    assert (one.budget_s, one.timeout_s, one.device, one.requires, one.number) == (30, 120, "cpu", (), 1)
    assert (two.budget_s, two.timeout_s, two.device, two.requires, two.number) == (7, 120, "gpu", ("01-one",), 2)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (book_toml(ONE + 'colour = "red"'), "part[0].chapter[0].colour", "unknown key"),
        (book_toml(ONE).replace("[defaults]", "[defaults]\nspeed = 1"), "defaults.speed", "unknown key"),
        (book_toml(ONE) + "[preface]\n", "preface", "unknown key"),
        (book_toml(ONE).replace('language = "en"', ""), "book.language", "missing"),
        (book_toml(ONE).replace('title = "One"', 'title = " "'), "part[0].chapter[0].title", "is empty"),
        (tiny.BOOK, "part", "missing"),
        ("part = 3\n" + tiny.BOOK, "part", "expected list, got 3"),
        (book_toml(""), "part[0].chapter", "missing"),
        (book_toml(ONE + ONE), "part[0].chapter[1].slug", "duplicate '01-one'"),
        (book_toml(tiny.entry("One", "One")), "part[0].chapter[0].slug", "lower case"),
        (book_toml(tiny.entry("one", "One")), "part[0].chapter[0].slug", "starts with its number"),
        (book_toml(tiny.entry("01-one", "One", "appendix")), "part[0].chapter[0].slug", "an appendix does not"),
        (book_toml(tiny.entry("02-two", "Two") + ONE), "part[0].chapter[1].slug", "numbers must increase"),
        (book_toml(ONE + tiny.entry("end", "End", "appendix")), "part[0].chapter", "parts of their own"),
        (book_toml(tiny.entry("01-one", "One", "easy")), "part[0].chapter[0].tier", "'easy'"),
        (book_toml(tiny.entry("01-one", "One", device="tpu")), "part[0].chapter[0].device", "'tpu'"),
        (book_toml(tiny.entry("01-one", "One", budget_s=0)), "part[0].chapter[0].budget_s", "positive"),
        (book_toml(tiny.entry("01-one", "One", budget_s="60")), "part[0].chapter[0].budget_s", "expected int"),
        (book_toml(tiny.entry("01-one", "One", requires=[1])), "part[0].chapter[0].requires", "list of strings"),
        (book_toml(tiny.entry("01-one", "One", requires=["02-two"]) + tiny.entry("02-two", "Two")),
         "part[0].chapter[0].requires", "'02-two' is no earlier chapter"),
        (book_toml(tiny.entry("01-one", "One", requires=["01-one"])), "requires", "no earlier chapter"),
        ("[book", "", "not TOML"),
    ],
)  # fmt: skip
def test_errors_in_the_list(tmp_path, text, key, message):
    (tmp_path / "book.toml").write_text(text)
    with pytest.raises(manifest.ManifestError) as caught:
        manifest.read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "book.toml"))
    assert f"{key}: " in str(caught.value)
    assert message in str(caught.value)


def test_no_list_at_all(tmp_path):
    with pytest.raises(manifest.ManifestError, match=r"book\.toml: missing file"):
        manifest.load(tmp_path)


def test_missing_chapter(tmp_path):
    tiny.write(tmp_path, ("01-one", "One", ""))
    (tmp_path / "chapters" / "01-one.md").unlink()
    with pytest.raises(manifest.ManifestError, match=r"book\.toml: slug '01-one': missing file .*01-one\.md"):
        manifest.load(tmp_path)


def test_title_differs_from_the_heading(tmp_path):
    tiny.write(tmp_path, ("01-one", "One", ""))
    path = tmp_path / "chapters" / "01-one.md"
    path.write_text(path.read_text().replace("# One", "```python\n# One\n```\n\n# Won"))
    with pytest.raises(manifest.ManifestError, match=r"slug '01-one': title is 'One', but .* starts with 'Won'"):
        manifest.load(tmp_path)


def test_what_is_not_listed_is_left_out_with_a_word(tmp_path):
    tiny.write(tmp_path, ("01-one", "One", ""))
    (tmp_path / "chapters" / "index.md").write_text("# Home\n")
    assert manifest.left_out(manifest.load(tmp_path)) == []
    (tmp_path / "chapters" / "02-two.md").write_text("# Two\n")
    (tmp_path / "chapters" / "untitled.ipynb").write_text("{}\n")
    assert manifest.left_out(manifest.load(tmp_path)) == [
        "chapters/02-two.md is not listed in book.toml, and was left out",
        "chapters/untitled.ipynb is not listed in book.toml, and was left out",
    ]


def test_every_chapter_that_was_committed_is_listed():
    """A file that somebody forgot to list, and not one that lies there while he works on it."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed: nothing tells what was committed")
    report = subprocess.run(["git", "ls-files", "chapters"], cwd=manifest.ROOT, capture_output=True, text=True)
    if report.returncode != 0:
        pytest.skip("this copy of the book is no git repository: nothing tells what was committed")
    committed = {line for line in report.stdout.splitlines() if line.endswith((".md", ".ipynb"))}
    assert not [note for note in manifest.left_out(manifest.load()) if note.split()[0] in committed]
