"""A course that has started keeps its grades, its answers, its points and its last release."""

import shutil
import sqlite3
import subprocess
from contextlib import closing

import nbformat
import pytest
from nbgrader.api import Gradebook

from tests.book import tiny
from tools import manifest, student
from tools.manifest import ROOT
from tools.source import ChapterError

SECOND = tiny.EXERCISE.replace("ex-twice", "ex-again")


def book(root, one, *two):
    return manifest.load(tiny.write(root, ("01-one", "One", one), *(("02-two", "Two", text) for text in two)))


def contents(folder):
    """Every file below a folder; of a gradebook what stands in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".db":
            with closing(sqlite3.connect(path)) as gradebook:
                found[path.name] = list(gradebook.iterdump())
        elif path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def hand_in(root, chapter="01-one"):
    target = root / "out" / "course" / "submitted" / "ann" / chapter
    target.mkdir(parents=True)
    shutil.copy(root / "out" / "student" / chapter / f"{chapter}.ipynb", target)


def record_a_submission(root):
    """As after grading, with the folder of answers moved elsewhere."""
    with closing(sqlite3.connect(root / "out" / "course" / "gradebook.db")) as gradebook, gradebook:
        ((assignment,),) = gradebook.execute("SELECT id FROM assignment WHERE name = '01-one'")
        gradebook.execute("INSERT INTO student (id, lms_user_id) VALUES ('ann', '')")
        gradebook.execute("INSERT INTO submitted_assignment (id, assignment_id, student_id) VALUES ('1', ?, 'ann')",
                          [assignment])  # fmt: skip


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    root = tmp_path_factory.mktemp("master")
    student.build(book(root, tiny.EXERCISE, SECOND))
    return root


@pytest.fixture
def released(master, tmp_path):
    return shutil.copytree(master, tmp_path, dirs_exist_ok=True)


CHANGES = {
    "points": (
        tiny.EXERCISE.replace("points: 2", "points: 5"), SECOND, "01-one, ex-twice: 2 points before, 5 points now"
    ),
    "points of a chapter that nobody handed in": (
        tiny.EXERCISE, SECOND.replace("points: 2", "points: 1"), "02-two, ex-again: 2 points before, 1 points now"
    ),
    "a new name": (
        tiny.EXERCISE.replace("ex-twice", "ex-double"), SECOND, "01-one, ex-double: not there before, 2 points now"
    ),
    "one more": (
        tiny.EXERCISE + tiny.EXERCISE.replace("ex-twice", "ex-third"), SECOND,
        "01-one, ex-third: not there before, 2 points now",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("one", "two", "message"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("start", [hand_in, record_a_submission])
def test_a_course_that_has_started_keeps_its_points(released, start, one, two, message):
    start(released)
    before = contents(released / "out")
    with pytest.raises(student.CourseError, match=r"(?s)^This course has started.*Nothing was changed") as caught:
        student.build(book(released, one, two))
    assert message in str(caught.value).splitlines()
    assert contents(released / "out") == before


def test_a_course_that_has_started_gets_new_words_and_new_chapters(tmp_path):
    student.build(book(tmp_path, tiny.EXERCISE))
    hand_in(tmp_path)
    record_a_submission(tmp_path)
    new = tiny.EXERCISE.replace("Double a number.", "Double any number.")
    assert len(student.build(book(tmp_path, new, SECOND))) == 2
    release = tmp_path / "out" / "student"
    assert "Double any number." in (release / "01-one" / "01-one.ipynb").read_text()
    assert (release / "02-two" / "02-two.ipynb").is_file()
    assert (tmp_path / "out" / "course" / "submitted" / "ann" / "01-one" / "01-one.ipynb").is_file()
    with Gradebook(f"sqlite:///{tmp_path / 'out' / 'course' / 'gradebook.db'}") as gradebook:
        assert [submission.student.id for submission in gradebook.assignment_submissions("01-one")] == ["ann"]
        assert gradebook.find_assignment("02-two").max_score == 2


def test_before_the_first_answer_points_may_change_and_are_named(released, capsys):
    student.build(book(released, *CHANGES["points"][:2]))
    assert "Changed since the last release: " + CHANGES["points"][2] in capsys.readouterr().err
    with Gradebook(f"sqlite:///{released / 'out' / 'course' / 'gradebook.db'}") as gradebook:
        assert gradebook.find_assignment("01-one").max_score == 5


def test_a_release_that_fails_halfway_leaves_the_last_one(released, monkeypatch):
    before = contents(released / "out")
    generate = student.NbGraderAPI.generate_assignment

    def fail_at_the_second(self, slug, **options):
        return {"success": False, "error": "no space left"} if slug == "02-two" else generate(self, slug, **options)

    monkeypatch.setattr(student.NbGraderAPI, "generate_assignment", fail_at_the_second)
    with pytest.raises(ChapterError, match="02-two: nbgrader: no space left"):
        student.build(book(released, tiny.EXERCISE.replace("Double", "Treble"), SECOND))
    assert contents(released / "out") == before


def test_a_gradebook_that_is_being_written_is_not_overwritten(released, monkeypatch):
    generate = student.NbGraderAPI.generate_assignment

    def meanwhile(self, slug, **options):
        if slug == "02-two":
            record_a_submission(released)
        return generate(self, slug, **options)

    monkeypatch.setattr(student.NbGraderAPI, "generate_assignment", meanwhile)
    with pytest.raises(student.CourseError, match=r"gradebook.db changed meanwhile; nothing was released"):
        student.build(book(released, tiny.EXERCISE, SECOND))
    with Gradebook(f"sqlite:///{released / 'out' / 'course' / 'gradebook.db'}") as gradebook:
        assert len(gradebook.assignment_submissions("01-one")) == 1


def test_what_else_a_teacher_keeps_in_the_course_stays(released):
    own = released / "out" / "course" / "source" / "exam" / "exam.ipynb"
    own.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(), own)
    student.build(book(released, tiny.EXERCISE, SECOND))
    assert own.is_file()


def make_clean(root):
    shutil.copy(ROOT / "Makefile", root)
    return subprocess.run(["make", "clean"], cwd=root, capture_output=True, text=True, check=True).stdout


def test_clean_keeps_a_course(released):
    hand_in(released)
    for built in ("html/index.html", "notebooks/01-one.ipynb", "running/x", ".hidden/x"):
        (released / "out" / built).parent.mkdir(parents=True, exist_ok=True)
        (released / "out" / built).touch()
    (released / ".pytest_cache").mkdir()
    (released / ".venv").mkdir()
    course, release = (contents(released / "out" / name) for name in ("course", "student"))
    assert "Kept out/course and out/student" in make_clean(released)
    assert sorted(path.name for path in (released / "out").iterdir()) == ["course", "student"]
    assert (contents(released / "out" / "course"), contents(released / "out" / "student")) == (course, release)
    assert not (released / ".pytest_cache").exists()
    assert (released / ".venv").exists()


def test_clean_without_a_course_leaves_nothing(tmp_path):
    make_clean(tmp_path)
    (tmp_path / "out" / "html").mkdir(parents=True)
    assert "Kept" not in make_clean(tmp_path)
    assert not (tmp_path / "out").exists()


def test_help_builds_nothing(tmp_path):
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", tiny.EXERCISE)))
    report = tiny.run(root, "tools.student", "--help")
    assert report.returncode == 0
    assert "out/course" in report.stdout
    assert not (root / "out").exists()
