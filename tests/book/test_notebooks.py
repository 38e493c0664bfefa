"""Chapters run, checks that cannot fail turn red, and what failed replaces nothing."""

import functools
import importlib
import os
import re
import sys
from types import ModuleType

import nbformat
import pytest

from tests.book import tiny
from tools import manifest, notebooks
from tools.source import ChapterError
from tools.verification import VerificationError, check_must_fail, stub_must_fail

CHECK = "assert abs(add(2, 2) - 4) < 1e-12"


ROOM = "maths.sums.add"


@pytest.fixture
def room(monkeypatch):
    """The function of a room of its own."""
    module = ModuleType("kfqn_core.maths.sums")
    exec("def add(a, b):\n    return a + b", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.import_module("kfqn_core.maths"), "sums", module, raising=False)
    return module.add


@pytest.mark.parametrize(
    ("check", "broken_by", "message"),
    [
        ("add(1, 1)\nassert abs(4 - 4) < 1e-12", "add = None", "stops with TypeError.* instead of failing its assert"),
        ("add(1, 1)\nassert 4 == 4", "add = max", "still passes after its broken_by, so it cannot fail"),
        (CHECK, "add = lambda a, b: b + a", "still passes after its broken_by, so it cannot fail"),
        (CHECK, "add = nothing", "broken_by itself fails .NameError"),
        (CHECK.replace("add", "changed_later"), "changed_later = add", "a later cell changes a variable it reads"),
        ("assert abs(result - 4) < 1e-12", "add = None; result = 5", f"never enters its room {ROOM}"),
        (CHECK.replace("4", "four"), "add = add; four = 5", "broken_by binds add to what it was"),
    ],
)
def test_a_check_that_cannot_fail_is_reported(room, check, broken_by, message):
    variables = {"add": room, "changed_later": lambda a, b: room(a, b) * 2 - 3, "result": room(2, 2), "four": 4}
    with pytest.raises(VerificationError, match=f"^here: .*{message}"):
        check_must_fail(variables, "here", check, broken_by, ROOM)


def test_a_check_is_broken_in_a_copy(room):
    variables = {"add": room}
    check_must_fail(variables, "here", f"error = 1\n{CHECK}", "add = lambda a, b: a - b", ROOM)
    assert variables == {"add": room}


def test_a_room_may_be_entered_on_a_detour(room):
    """Through a function of another cell, a wrapper, a copy under another name."""
    variables = {"add": room, "indirect": lambda a: functools.partial(room, a)(a)}
    check = "assert abs(indirect(2) - 4) < 1e-12"
    check_must_fail(variables, "here", check, "add = None; indirect = lambda a: 0", ROOM)
    assert sys.getprofile() is None


def test_a_grader_that_accepts_the_stub_is_reported():
    with pytest.raises(VerificationError, match=r"^here: the grader accepts the stub"):
        stub_must_fail({}, "here", "x = 2", "raise NotImplementedError()", "print('fine')")


def test_the_answer_does_not_survive_from_the_run_with_the_solution():
    variables = {"x": 2}  # the chapter has run, with its solution
    stub_must_fail(variables, "here", "x = 2", "raise NotImplementedError()", "assert x == 2")
    assert variables == {"x": 2}


def test_an_executed_chapter(tmp_path):
    progress = tiny.code("from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    pass")
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", tiny.CLAIM + tiny.EXERCISE + progress)))
    (chapter,) = book.chapters
    timing = notebooks.execute(book, chapter)
    assert 0 < timing.verifying_s < timing.reading_s

    path = notebooks.published(book, chapter)
    text = path.read_text()
    assert "error 0" in text
    assert "ex-twice: correct" in text
    assert "tools.verification" not in text
    assert str(tmp_path) not in text
    assert notebooks.WIDGET not in text
    assert not (tmp_path / "out" / "running" / path.name).exists()

    assert notebooks.is_fresh(book, chapter)
    first = path.read_bytes()
    notebooks.execute(book, chapter)
    assert path.read_bytes() == first

    package = tmp_path / "kfqn_core"
    (package / "maths").mkdir(parents=True)
    (package / "maths" / "algebra.py").write_text("# the code the chapter stands on\n")
    assert not notebooks.is_fresh(book, chapter)
    notebooks.execute(book, chapter)
    (package / "maths").rename(package / "mathematics")
    assert not notebooks.is_fresh(book, chapter)


def pictures(book, chapter):
    cells = nbformat.read(notebooks.published(book, chapter), as_version=4).cells
    return [kind for cell in cells for output in cell.get("outputs", []) for kind in output.get("data", {})
            if kind.startswith("image/")]  # fmt: skip


@pytest.mark.parametrize("where", ["shell", "shell of another kind", "settings"])
def test_pictures_go_to_the_page_whatever_backend_is_chosen(tmp_path, monkeypatch, where):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if where == "settings":
        (tmp_path / "matplotlibrc").write_text("backend: Agg\n")
        monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))
    else:
        monkeypatch.setenv("MPLBACKEND", "Agg" if where == "shell" else "svg")
    before = dict(os.environ)
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", tiny.FIGURE)))
    notebooks.execute(book, book.chapters[0])
    assert pictures(book, book.chapters[0]) == ["image/png"]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ax.plot([0, 1])\nplt.show()", "ax.plot([0, 1])\nplt.close()"),
        (
            "import matplotlib.pyplot as plt",
            "import matplotlib.pyplot as plt\nplt.switch_backend('Agg')",
        ),
        ("fig, ax = plt.subplots()\nax.plot([0, 1])\nplt.show()", "print('a table of numbers')"),
    ],
)
def test_a_figure_without_a_picture_fails(tmp_path, old, new):
    assert old in tiny.FIGURE
    first = tiny.code("one = 1")
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", first + tiny.FIGURE.replace(old, new))))
    with pytest.raises(ChapterError, match=r"^01-one, code cell 2 \(import matplotlib.*no picture came out of "):
        notebooks.execute(book, book.chapters[0])
    assert not notebooks.published(book, book.chapters[0]).exists()


def test_a_picture_of_another_kind_is_one(tmp_path):
    svg = "from IPython.display import SVG\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')\n```\n"
    figure = tiny.FIGURE.partition("import matplotlib")[0] + svg
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", figure)))
    notebooks.execute(book, book.chapters[0])
    assert pictures(book, book.chapters[0]) == ["image/svg+xml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lambda A, G, V: A - V", "lambda A, G, V: A * V",
         r"^01-one, code cell 2 \(error = abs\(kron_matvec.*\): the check still passes"),
        ("float(x)", "float(y)",
         r"^01-one, code cell 2 \(error = abs\(kron_matvec.*\): NameError: name 'y' is not defined"),
        ("assert twice(3) == 6", "assert True",
         r"^01-one, code cell 3 \(def twice\(x\):\): the grader accepts the stub"),
    ],
)  # fmt: skip
def test_a_failing_chapter_is_named_and_replaces_nothing(tmp_path, old, new, message):
    text = tiny.CLAIM + tiny.EXERCISE
    assert old in text
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", text.replace(old, new))))
    (chapter,) = book.chapters
    published = notebooks.published(book, chapter)
    published.parent.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(metadata={"stamp": "the last good one"}), published)
    good = published.read_bytes()
    with pytest.raises(ChapterError, match=message):
        notebooks.execute(book, chapter)
    assert published.read_bytes() == good


def test_a_cell_over_its_time_is_named(tmp_path):
    slow = tiny.code("import time\ntime.sleep(30)")
    root = tiny.write(tmp_path, ("01-one", "One", slow), c01_one={"timeout_s": 1})
    book = manifest.load(root)
    with pytest.raises(ChapterError, match=r"^01-one, code cell 1 \(import time\): .*[Tt]im"):
        notebooks.execute(book, book.chapters[0])


def test_metadata_that_is_not_yaml_names_the_chapter(tmp_path):
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", tiny.CLAIM.replace('broken_by: "', "broken_by: {"))))
    with pytest.raises(ChapterError, match=r"^01-one: header or cell metadata is not YAML"):
        notebooks.execute(book, book.chapters[0])


OVER = re.compile(r"02-slow: took (\d+\.\d) s, budget 2 s: if this machine is quiet, make it smaller")


def test_pytest_reports_chapters(tmp_path):
    sleep = tiny.code("import time\ntime.sleep(2)")
    chapters = [
        ("01-good", "Good", tiny.CLAIM),
        ("02-slow", "Slow", sleep),
        ("03-wrong", "Wrong", tiny.code("1 / 0")),
        ("04-endless", "Endless", tiny.code("import time\ntime.sleep(60)")),
        ("05-gpu", "Graphics", ""),
    ]
    root = tiny.write(
        tmp_path,
        *chapters,
        c02_slow={"budget_s": 2},
        c04_endless={"budget_s": 1, "timeout_s": 60},
        c05_gpu={"device": "gpu"},
    )
    tiny.install_tools(root)
    report = tiny.run(root, "pytest", "-v", "-rfs", "--nbmake", "chapters").stdout
    lines = report.splitlines()

    def has(*pieces):
        return any(all(piece in line for piece in pieces) for line in lines)

    assert has("chapters/01-good.md::Good PASSED (took ", " s, budget 30 s; checks tried in ")
    assert has("chapters/02-slow.md::Slow PASSED (took ", " s, budget 2 s; checks tried in ")
    assert [line for line in lines if OVER.match(line)]
    assert has("FAILED chapters/03-wrong.md::Wrong - 03-wrong, code cell 1 (1 / 0): ZeroDivisionError")
    assert has("FAILED chapters/04-endless.md::Endless - 04-endless: stopped after 20 times its budget of 1 s")
    assert has("SKIPPED", "this chapter needs a GPU, and there is none here")
    assert "2 failed, 2 passed, 1 skipped" in report

    # A reader who makes the book waits for a slow chapter and gets it; nothing is executed twice.
    report = tiny.run(root, "pytest", "-v", "--nbmake", "--reuse", "chapters/01-good.md", "chapters/02-slow.md")
    assert report.returncode == 0, report.stdout
    assert report.stdout.count("REUSED") == 2


def test_a_chapter_over_its_budget_fails_only_where_it_is_asked_to(tmp_path):
    slow = tiny.code("import time\ntime.sleep(2)")
    root = tiny.write(tmp_path, ("01-good", "Good", ""), ("02-slow", "Slow", slow), c02_slow={"budget_s": 2})
    tiny.install_tools(root)
    report = tiny.run(root, "pytest", "-q", "-n", "2", "--nbmake", "chapters")
    assert report.returncode == 0, report.stdout
    (seconds,) = OVER.findall(report.stdout)
    assert float(seconds) >= 2

    report = tiny.run(root, "pytest", "-q", "--nbmake", "--strict-budgets", "chapters")
    assert report.returncode == 1
    assert re.search("^FAILED chapters/02-slow.md::Slow - " + OVER.pattern, report.stdout, re.MULTILINE)
    assert "1 failed, 1 passed" in report.stdout


def test_only_listed_chapters_run(tmp_path):
    """Notes, a chapter that is being written, a notebook that Jupyter made: none is executed, none is in the way."""
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", tiny.CLAIM)))
    stray = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("open('../ran', 'w').write('it did')\n1 / 0")])
    for place in ("chapters/untitled.ipynb", "chapters/notes/more.ipynb", "out/notebooks/old.ipynb", "mine.ipynb"):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(stray, root / place)
    (root / "chapters" / "untitled.md").write_text(tiny.HEADER + tiny.code("1 / 0"))
    (root / "chapters" / "note.md").write_text("---\nnot: [yaml\n---\nno notebook at all\n")
    report = tiny.run(root, "pytest", "-q", "--nbmake", ".")  # the chapters, and whatever else lies about
    assert report.returncode == 0, report.stdout
    assert "2 passed" in report.stdout, "the chapter, and the unit test"
    assert "untitled.ipynb is not listed in book.toml, and was left out" in report.stdout
    assert "untitled.md is not listed in book.toml, and was left out" in report.stdout
    assert not list(root.rglob("ran"))


def test_pytest_names_what_is_wrong_with_the_list(tmp_path):
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", "")))
    (root / "book.toml").write_text((root / "book.toml").read_text() + 'colour = "red"\n')
    report = tiny.run(root, "pytest", "--nbmake", "chapters")
    assert report.returncode != 0
    assert "book.toml: part[0].chapter[0].colour: unknown key" in report.stdout + report.stderr
