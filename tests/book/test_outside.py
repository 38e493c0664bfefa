"""A student's notebook is opened where the course puts it, which may be outside of the repository."""

import os
import subprocess
import sys

import pytest

from tools import manifest, rooms, source

BOOK = manifest.read()
BESIDE = f"from {rooms.BESIDE} import"


def first_lines(chapter):
    """The lines of the chapter that look for the repository."""
    for _, cell in source.code_cells(source.read(BOOK, chapter)):
        if BESIDE in cell.source:
            return (
                "import sys\nfrom pathlib import Path\nimport kfqn_core\n"
                + cell.source[cell.source.index("# The comparison stands") : cell.source.index(BESIDE)]
            )
    return None


CHAPTERS = [chapter for chapter in BOOK.chapters if first_lines(chapter)]
each = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.slug)


@pytest.fixture
def run(tmp_path):
    """Run code in a folder of a student's, with a package that is installed in `lib` (a copy, or a link to it)."""

    def run(code, home, lib):
        environment = os.environ | {"PYTHONPATH": str(lib)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)

    return run


def make(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def test_chapters_that_read_the_comparison_are_found():
    assert [chapter.slug for chapter in CHAPTERS] == ["08-k-bfgs", "13-does-it-win"]


@each
def test_outside_it_says_what_is_missing_and_what_to_do(chapter, run, tmp_path):
    lib, home = make(tmp_path / "lib", "kfqn_core/__init__.py"), make(tmp_path / "home" / "student", "notebook.ipynb")
    report = run(first_lines(chapter), home, lib)
    assert report.returncode == 1
    last = report.stderr.strip().splitlines()[-1]
    assert last.startswith("FileNotFoundError: This chapter reads the comparison, the folder benchmarks")
    assert str(home) in last
    assert str(lib / "kfqn_core") in last
    assert "open the notebook inside a copy of the repository" in last


@each
@pytest.mark.parametrize("where", ["inside", "outside, developed here"])
def test_where_the_repository_can_be_found_it_is(chapter, run, tmp_path, where):
    root = make(tmp_path / "book", "book.toml", "benchmarks/protocol.py", "kfqn_core/__init__.py", "course/a/x.ipynb")
    lib = tmp_path / "lib"
    lib.mkdir()
    if where == "inside":
        home = root / "course" / "a"
        make(lib, "kfqn_core/__init__.py")
    else:
        home = make(tmp_path / "home", "notebook.ipynb")
        (lib / "kfqn_core").symlink_to(root / "kfqn_core")
    report = run(first_lines(chapter) + f"\nassert ROOT == Path({str(root)!r}) == Path(sys.path[0])", home, lib)
    assert report.returncode == 0, report.stderr
