"""From release to feedback: right, wrong, lazy, looping and crashing answers, each of which costs what it should."""

import os
import shutil

import nbformat
import pytest
from nbgrader.api import Gradebook

from tests.book import tiny
from tools import course, manifest, marking, release
from tools.manifest import ROOT

HELPER = tiny.code("import math\n\ndef half(x):\n    return x / 2\n\nsome = math.floor(6.5)")
FIRST = tiny.EXERCISE.replace("An explanation for those who opened it.", tiny.RUBRIC).replace(
    'assert twice(3) == 6, "twice(3) should be 6"',
    'assert half(twice(3)) == 3, "twice(3) is not it"\n### BEGIN HIDDEN TESTS\nassert half(twice(some)) == some\n'
    "### END HIDDEN TESTS",
)
SECOND = tiny.EXERCISE.replace("ex-twice", "ex-again").replace("twice(", "again(")
STUB = "raise NotImplementedError()"


# What stands in place of the two stubs, the words below the first, and the points of both: 2 and 2.
SUBMISSIONS = {
    "right": ("return x + x", "return x + x", None, (2, 2)),
    "wrong": ("return x * x", "return x + x", None, (0, 2)),
    "lazy": (STUB, STUB, None, (0, 0)),
    "constant": ("return 6", "return 6", None, (0, 2)),  # the second grader has no hidden test
    "in words": ("return x + x", STUB, "Because it is so.", (2, 0)),
    "a helper of the same name": ("return x\n\n\ndef half(x):\n    return x", "return x + x", None, (0, 2)),
    "loops": ("while True:\n        pass", "return x + x", None, (0, 2)),
    "loops and will not stop": (
        "while True:\n        try:\n            while True:\n                pass\n        except BaseException:\n"
        "            pass", "return x + x", None, (0, 2),
    ),
    "loops in its own cell": ("return x + x\n\n\nwhile True:\n    pass", "return x + x", None, (0, 2)),
    "crashes": ("import os\n    os._exit(1)", "return x + x", None, (0, 2)),
    "crashes in its own cell": ("return x + x\n\n\nimport os\nos._exit(1)", "return x + x", None, (0, 2)),
    "quits": ("exit()", "return x + x", None, (0, 2)),
    "deletes the grader": ("return x * x", "return x + x", None, (None, 2)),
    "warns": ("import warnings\n    warnings.warn('careful')\n    return x + x", "return x + x", None, (2, 2)),
}  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """One course in which all of them handed in."""
    root = tmp_path_factory.mktemp("course")
    os.environ["PATH"] = os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ["PATH"]])
    text = HELPER + FIRST + SECOND
    book = manifest.load(tiny.write(root, ("01-one", "One", text), c01_one={"grading_s": 3}))
    place, chapters = root / "elsewhere", course.choose(book, [])
    assert release.run(book, place, chapters, force=False) == 0
    released = place / "release" / "01-one" / "01-one.ipynb"
    for student, (first, second, words, _) in SUBMISSIONS.items():
        notebook = nbformat.read(released, as_version=4)
        for cell in notebook.cells:
            name = cell.metadata.get("nbgrader", {}).get("grade_id")
            if name in ("ex-twice", "ex-again"):
                cell.source = cell.source.replace(STUB, first if name == "ex-twice" else second)
            if name == "ex-twice-written" and words:
                cell.source = words
        if student == "deletes the grader":
            notebook.cells = [cell for cell in notebook.cells if "twice(3)" not in cell.source]
        target = place / "submitted" / student / "01-one"
        target.mkdir(parents=True)
        nbformat.write(notebook, target / "01-one.ipynb")
    assert marking.run(book, place, chapters, force=False) == 0
    return book, place


def grades(place, student):
    with Gradebook(f"sqlite:///{place / 'gradebook.db'}") as gradebook:
        (notebook,) = gradebook.find_submission("01-one", student).notebooks
        return {grade.name: (grade.auto_score, grade.needs_manual_grade) for grade in notebook.grades}


@pytest.mark.parametrize("student", SUBMISSIONS)
def test_what_each_of_them_gets(graded, student):
    found = grades(graded[1], student)
    first, second = SUBMISSIONS[student][3]
    assert (found["ex-twice-check"][0], found["ex-again-check"][0]) == (first, second)
    written = SUBMISSIONS[student][2]
    assert found["ex-twice-written"] == ((None, True) if written else (0, False))


def test_feedback_is_there_for_all(graded):
    for student in SUBMISSIONS:
        feedback = graded[1] / "feedback" / student / "01-one" / "01-one.html"
        assert "Exercise 1.1" in feedback.read_text()


def test_feedback_says_what_happened(graded):
    text = {name: (graded[1] / "feedback" / name / "01-one" / "01-one.html").read_text() for name in SUBMISSIONS}
    assert "stopped after 3 seconds" in text["loops"]
    assert "the kernel died in this cell" in text["crashes"]


def test_whoever_marks_by_hand_sees_the_rubric_and_students_do_not(graded):
    place = graded[1]
    released = (place / "release" / "01-one" / "01-one.ipynb").read_text()
    marked = (place / "autograded" / "in words" / "01-one" / "01-one.ipynb").read_text()
    assert "adds the number to itself" in marked
    for secret in ("adds the number to itself", "return 2 * x", "twice(some)", "HIDDEN TESTS", "opened it"):
        assert secret not in released
    assert "**Written answer** (3 points): why it is twice" in released
    assert "2 points for the code, 3 for the written answer · difficulty ★☆☆ · about 5 minutes" in released


def test_only_what_is_new_is_graded_again(graded, capsys):
    book, place = graded
    chapters = course.choose(book, [])
    assert marking.run(book, place, chapters, force=False) == 0
    assert "0 graded" in capsys.readouterr().out
    wrong, right = (place / "submitted" / student / "01-one" / "01-one.ipynb" for student in ("wrong", "right"))
    shutil.copy(wrong, right)
    assert marking.run(book, place, chapters, force=False) == 0
    assert "1 graded" in capsys.readouterr().out
