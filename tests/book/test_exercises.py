"""One source for task, solution, grader and rubric, and what is refused of it."""

import pytest

from tests.book import tiny
from tools import assignment, exercises, manifest, source
from tools.source import ChapterError

WITH_WORDS = tiny.EXERCISE.replace("An explanation for those who opened it.", tiny.RUBRIC)


def read(root, text):
    book = manifest.load(tiny.write(root, ("01-one", "One", text)))
    return book, source.read(book, book.chapters[0])


def test_an_exercise(tmp_path):
    book, notebook = read(tmp_path, tiny.CLAIM + tiny.EXERCISE)
    (exercise,), problems = exercises.collect(book.chapters[0], notebook)
    assert problems == []
    assert (exercise.label, exercise.title, exercise.task) == ("ex-twice", "Twice", "Double a number.")
    assert "return 2 * x" in exercise.solution
    assert "return 2 * x" not in exercise.stub
    assert "raise NotImplementedError()" in exercise.stub
    assert exercise.grader.startswith("assert twice(3)")
    assert exercise.explanation == "An explanation for those who opened it."
    assert exercise.rubric is None
    assert exercise.facts == "2 points · difficulty ★☆☆ · about 5 minutes"


def test_a_written_answer(tmp_path):
    book, notebook = read(tmp_path, WITH_WORDS + tiny.EXERCISE.replace("ex-twice", "ex-again"))
    (exercise, other), problems = exercises.collect(book.chapters[0], notebook)
    assert problems == []
    assert exercise.rubric.prompt == "why it is twice"
    assert exercise.rubric.criteria == ((1, "adds the number to itself"), (2, "says that this is what twice means"))
    assert exercise.explanation == "An explanation for those who opened it."
    assert (exercise.points, exercise.total) == (2, 5)
    assert exercise.facts.startswith("2 points for the code, 3 for the written answer ·")
    assert other.rubric is None


def test_hidden_tests_are_not_visible():
    grader = "a = 1\n### BEGIN HIDDEN TESTS\na += 1\n### END HIDDEN TESTS\nassert a\n    ### BEGIN HIDDEN TESTS\nb\n"
    assert exercises.visible(grader + "    ### END HIDDEN TESTS") == "a = 1\nassert a"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (":label: ex-twice\n", "", "exercise 'Twice': write it as {exercise-start} with a label"),
        (":::{exercise-end}\n:::\n", "", "exercise 'ex-twice': no {exercise-end} before the next code cell"),
        ("grade_id: ex-twice,", "grade_id: ex-thrice,", "exercise 'ex-twice': no solution cell"),
        ("grade_id: ex-twice,", "grade_id: ex-thrice,", "nbgrader cell ex-thrice belongs to no exercise"),
        ("grade_id: ex-twice-check", "grade_id: ex-twice-test", "exercise 'ex-twice': no grader cell"),
        ("    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION", "    return 2 * x", "no ### BEGIN"),
        (":level: 1\n", ":level: 4\n", "the solution cell needs `level: 1`, 2 or 3, and says 4"),
        (":minutes: 5\n", "", "the solution cell needs `minutes`, the time a student takes, and says None"),
        ("* 1: adds", "* adds", "every line of the rubric is `* POINTS: what they are given for`"),
        ("The written answer: why it is twice", "", "the rubric has no title"),
    ],
)
def test_problems(tmp_path, old, new, problem):
    assert old in WITH_WORDS
    book, notebook = read(tmp_path, WITH_WORDS.replace(old, new))
    found = exercises.collect(book.chapters[0], notebook)[1]
    assert any(problem in text for text in found), found


@pytest.mark.parametrize(
    ("before", "old", "new", "problem"),
    [
        ("", "return 2 * x\n", "return 2 * x\n\n\nlimit = 3\n", None),  # not read by the grader
        ("", "    ### END SOLUTION\n", "    ### END SOLUTION\n### BEGIN SOLUTION\nsix = 6\n### END SOLUTION\n",
         "the grader reads six, which the stub does not name"),
        ("import math", "== 6", "== math.floor(six)", "the grader reads math: import it there"),
        ("", "== 6", "== six", "the grader reads six, which nobody defines"),
        ("six = 6", "== 6", "== six", None),
        ("def twice(x):\n    return 0\n\nsix = twice(0) + 6", "== 6", "== six", "twice is also a name of the chapter"),
    ],
)  # fmt: skip
def test_what_a_grader_may_read(tmp_path, before, old, new, problem):
    text = tiny.EXERCISE.replace(old, new)
    if "six = 6" in new:
        text = text.replace("== 6", "== six")
    book, _ = read(tmp_path, tiny.code(before or "pass") + text)
    if problem is None:
        assert len(assignment.exercises_of(book, book.chapters[0])) == 1
    else:
        with pytest.raises(ChapterError, match=problem):
            assignment.exercises_of(book, book.chapters[0])


def test_the_chapter_without_its_exercises(tmp_path):
    _, notebook = read(tmp_path, tiny.CLAIM + tiny.EXERCISE + "\nThe text goes on.\n")
    text = "\n".join(cell.source for cell in exercises.without_exercises(notebook).cells)
    assert "$2 + 2 = 4$" in text
    assert "The text goes on." in text
    for gone in ("Double a number", "def twice", "assert twice", "An explanation", "solution-start", "exercise-end"):
        assert gone not in text
