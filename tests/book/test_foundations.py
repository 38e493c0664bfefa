"""Outputs are reused only above the very packages and modules that they were made with."""

import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES

import nbformat
import pytest

from tests.book import tiny
from tools import foundations, manifest, notebooks


@pytest.fixture
def stamp(tmp_path, monkeypatch):
    """The stamp of a chapter with this code."""
    monkeypatch.syspath_prepend(tmp_path / "lib")
    (tmp_path / "lib").mkdir()

    def of(*code):
        foundations.installed.cache_clear()
        book = manifest.load(tiny.write(tmp_path, ("01-one", "One", "".join(map(tiny.code, code)))))
        return notebooks.stamp(book, book.chapters[0])

    yield of
    foundations.installed.cache_clear()


def test_a_stamp_is_the_same_for_the_same(stamp):
    assert stamp("import numpy") == stamp("import numpy")
    assert stamp("import numpy") != stamp("import numpy\n")


class Installed(metadata.Distribution):
    def __init__(self, name, version):
        self.files_of = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}

    def read_text(self, filename):
        return self.files_of.get(filename)

    def locate_file(self, path):
        return path


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([("torch", "2.13.0"), ("numpy", "2.4.6")], [("torch", "2.13.0"), ("numpy", "2.4.7")]),
        ([("torch", "2.13.0+cpu"), ("numpy", "2.4.6")], [("torch", "2.13.0+cu130"), ("numpy", "2.4.6")]),
        ([("torch", "2.13.0"), ("numpy", "2.4.6")], [("torch", "2.13.0")]),
    ],
    ids=["upgraded", "built otherwise", "removed"],
)
def test_a_package_that_changes_changes_the_stamp(stamp, monkeypatch, before, after):
    stamps = []
    for there in (before, before[::-1], after):
        monkeypatch.setattr(metadata, "distributions", lambda there=there: [Installed(*entry) for entry in there])
        stamps.append(stamp("one = 1"))
    assert stamps[0] == stamps[1], "in whatever order they are found"
    assert stamps[0] != stamps[2]


def test_another_python_changes_the_stamp(stamp, monkeypatch):
    before = stamp("one = 1")
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert stamp("one = 1") != before


LOOSE = {
    "a module": ("loose_one.py", "import loose_one"),
    "a module of a package": ("loose_one/inner/deep.py", "from loose_one import inner"),
    "a namespace": ("loose_one/deep.py", "import loose_one.deep as deep"),
    "below a module": ("loose_two.py", "import loose_one"),
    "beside a magic": ("loose_one.py", "%matplotlib inline\n!true\nimport loose_one"),
    "late": ("loose_one.py", "def late():\n    from loose_one import x\n    return x"),
    "compiled": (f"loose_one/core{EXTENSION_SUFFIXES[-1]}", "import loose_one"),
}


@pytest.mark.parametrize(("file", "code"), LOOSE.values(), ids=LOOSE)
def test_a_module_without_a_version_changes_the_stamp(stamp, tmp_path, file, code):
    lib = tmp_path / "lib"
    if "inner" in file:
        (lib / "loose_one").mkdir()
        (lib / "loose_one" / "__init__.py").touch()
    if file == "loose_two.py":
        (lib / "loose_one.py").write_text("import os\nimport loose_two\n")
    path = lib / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("__version__ = 1\n")
    before = stamp(code)
    assert stamp(code) == before
    path.write_text("__version__ = 2\n")
    assert stamp(code) != before
    bystander = lib / "nobody_imports_this.py"
    before = stamp(code)
    bystander.write_text("x = 1\n")
    assert stamp(code) == before


def test_what_has_a_version_is_not_read_file_by_file():
    assert foundations.loose_files(["torch", "numpy", "os", "sys", "no_such_module", "__main__"]) == []


def test_a_copy_before_an_installed_package_counts(tmp_path, monkeypatch):
    (tmp_path / "tqdm.py").write_text("# mine\n")
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert foundations.loose_files(["tqdm"]) == [tmp_path / "tqdm.py"]


def test_make_book_shows_what_is_installed(tmp_path):
    """From the shell: a package without metadata on PYTHONPATH is upgraded below a chapter."""
    root = tiny.install_tools(
        tiny.write(tmp_path, ("01-one", "One", tiny.code("import helper\nprint(helper.answer())")))
    )
    lib = tmp_path / "elsewhere"
    (lib / "helper").mkdir(parents=True)
    (lib / "helper" / "__init__.py").write_text("from helper.values import answer\n")
    shown, reused = [], []
    for value in (41, 41, 42):
        (lib / "helper" / "values.py").write_text(f"def answer():\n    return {value}\n")
        report = tiny.run(root, "pytest", "-v", "--nbmake", "--reuse", "chapters",
                          PYTHONPATH=str(lib), PYTHONDONTWRITEBYTECODE="1")  # fmt: skip
        assert report.returncode == 0, report.stdout
        reused.append("REUSED" in report.stdout)
        notebook = nbformat.read(root / "out" / "notebooks" / "01-one.ipynb", as_version=4)
        shown.append(notebook.cells[1].outputs[0].text.strip())
    assert (shown, reused) == (["41", "41", "42"], [False, True, False])
