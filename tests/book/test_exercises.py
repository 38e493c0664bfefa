"""One source for task, solution and grader: what students get, and how nbgrader marks it."""

import shutil

import nbformat
import pytest
from nbgrader.api import Gradebook

from tests.book import tiny
from tools import exercises, manifest, source, student
from tools.source import ChapterError


def read(root, text):
    book = manifest.load(tiny.write(root, ("01-one", "One", text)))
    return book, source.read(book, book.chapters[0])


def test_an_exercise(tmp_path):
    book, notebook = read(tmp_path, tiny.CLAIM + tiny.EXERCISE)
    (exercise,), problems = exercises.collect(book.chapters[0], notebook)
    assert problems == []
    assert (exercise.label, exercise.title) == ("ex-twice", "Twice")
    assert "return 2 * x" in exercise.solution
    assert "return 2 * x" not in exercise.stub
    assert "raise NotImplementedError()" in exercise.stub
    assert exercise.grader.startswith("assert twice(3)")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (":label: ex-twice\n", "", "exercise 'Twice': write it as {exercise-start} with a label"),
        ("grade_id: ex-twice,", "grade_id: ex-thrice,", "exercise 'ex-twice': no solution cell"),
        ("grade_id: ex-twice,", "grade_id: ex-thrice,", "nbgrader cell ex-thrice belongs to no exercise"),
        ("grade_id: ex-twice-check", "grade_id: ex-twice-test", "exercise 'ex-twice': no grader cell"),
        ("    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION", "    return 2 * x", "no ### BEGIN"),
    ],
)
def test_problems(tmp_path, old, new, problem):
    assert old in tiny.EXERCISE
    book, notebook = read(tmp_path, tiny.EXERCISE.replace(old, new))
    assert any(problem in text for text in exercises.collect(book.chapters[0], notebook)[1])


def test_students_get_no_explanation(tmp_path):
    _, notebook = read(tmp_path, tiny.CLAIM + tiny.EXERCISE + "\nThe text goes on.\n")
    text = "\n".join(cell.source for cell in exercises.without_explanations(notebook).cells)
    assert "Double a number" in text
    assert "def twice" in text
    assert "assert twice(3)" in text
    assert "The text goes on." in text
    assert "An explanation" not in text
    assert "solution-start" not in text
    assert "solution-end" not in text


def test_nbgrader_gives_nothing_for_the_stub_and_everything_for_the_solution(tmp_path):
    book = manifest.load(tiny.write(tmp_path, ("01-one", "One", tiny.EXERCISE), ("02-two", "Two", "No exercises.\n")))
    (released,) = student.build(book)
    assert released == tmp_path / "out" / "student" / "01-one" / "01-one.ipynb"
    assert "return 2 * x" not in released.read_text()

    course = tmp_path / "out" / "course"
    nobody, everybody = (course / "submitted" / name / "01-one" / "01-one.ipynb" for name in ("nobody", "everybody"))
    nobody.parent.mkdir(parents=True)
    shutil.copy(released, nobody)
    answered = nbformat.read(released, as_version=4)
    for cell in answered.cells:
        cell.source = cell.source.replace("raise NotImplementedError()", "return x + x")
    everybody.parent.mkdir(parents=True)
    nbformat.write(answered, everybody)

    report = tiny.run(course, "nbgrader", "autograde", "01-one")
    assert report.returncode == 0, report.stderr
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        scores = {entry["student"]: entry["score"] for entry in gradebook.submission_dicts("01-one")}
        assert gradebook.find_assignment("01-one").max_score == 2
    assert scores == {"nobody": 0, "everybody": 2}


def test_a_chapter_with_a_broken_exercise_is_not_released(tmp_path):
    book, _ = read(tmp_path, tiny.EXERCISE.replace("grade_id: ex-twice,", "grade_id: ex-thrice,"))
    with pytest.raises(ChapterError, match="no solution cell with grade_id ex-twice"):
        student.build(book)
