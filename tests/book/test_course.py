"""A course that has started keeps its grades, its answers, its points and its last release."""

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing

import nbformat
import pytest
from nbgrader.api import Gradebook

from tests.book import tiny
from tools import course, manifest, marking, release
from tools.manifest import ROOT
from tools.source import ChapterError

SECOND = tiny.EXERCISE.replace("ex-twice", "ex-again")


@pytest.fixture(autouse=True)
def path_to_jupyter(monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ["PATH"]]))


def book(root, one, *two):
    return manifest.load(tiny.write(root, ("01-one", "One", one), *(("02-two", "Two", text) for text in two)))


def publish(made, *names, force=False):
    return release.run(made, made.root / "course", course.choose(made, list(names)), force)


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
    target = root / "course" / "submitted" / "ann" / chapter
    target.mkdir(parents=True)
    shutil.copy(root / "course" / "release" / chapter / f"{chapter}.ipynb", target)


def record_a_submission(root):
    """As after grading, with the folder of answers moved elsewhere."""
    with closing(sqlite3.connect(root / "course" / "gradebook.db")) as gradebook, gradebook:
        ((assignment,),) = gradebook.execute("SELECT id FROM assignment WHERE name = '01-one'")
        gradebook.execute("INSERT INTO student (id, lms_user_id) VALUES ('ann', '')")
        gradebook.execute("INSERT INTO submitted_assignment (id, assignment_id, student_id) VALUES ('1', ?, 'ann')",
                          [assignment])  # fmt: skip


def points_of(root, chapter):
    with Gradebook(f"sqlite:///{root / 'course' / 'gradebook.db'}") as gradebook:
        return gradebook.find_assignment(chapter).max_score


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    root = tmp_path_factory.mktemp("master")
    os.environ["PATH"] = os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ["PATH"]])
    assert publish(book(root, tiny.EXERCISE, SECOND)) == 0
    return root


@pytest.fixture
def released(master, tmp_path):
    return shutil.copytree(master, tmp_path, dirs_exist_ok=True)


CHANGES = {
    "points": (tiny.EXERCISE.replace("points: 2", "points: 5"), ["ex-twice: 2 points before, 5 points now."]),
    "a new name": (
        tiny.EXERCISE.replace("ex-twice", "ex-double"),
        ["ex-double: not there before, 2 points now.", "ex-twice: 2 points before, not there now."],
    ),
    "one more": (
        tiny.EXERCISE + tiny.EXERCISE.replace("ex-twice", "ex-third"),
        ["ex-third: not there before, 2 points now."],
    ),
    "other words": (
        tiny.EXERCISE.replace("Double a number.", "Double any number."),
        ["ex-twice: another text, solution or grader, for the same 2 points."],
    ),
    "a written answer": (
        tiny.EXERCISE.replace("An explanation for those who opened it.", tiny.RUBRIC),
        ["ex-twice: 2 points before, 5 points now."],
    ),
}


@pytest.mark.parametrize(("one", "sentences"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("start", [hand_in, record_a_submission])
def test_a_chapter_that_was_handed_in_stays_as_it_is(released, capsys, start, one, sentences):
    start(released)
    before = contents(released / "course" / "source" / "01-one"), contents(released / "course" / "release" / "01-one")
    assert publish(book(released, one, SECOND)) == 1
    said = capsys.readouterr().out
    assert "01-one: kept as it is, one student has handed it in." in said
    assert [line.strip() for line in said.splitlines() if line.startswith("  ex-")] == sentences
    assert "FORCE=1" in said
    now = contents(released / "course" / "source" / "01-one"), contents(released / "course" / "release" / "01-one")
    assert now == before
    assert points_of(released, "01-one") == 2


def test_the_other_chapters_are_released_all_the_same(released):
    hand_in(released)
    new = SECOND.replace("points: 2", "points: 3")
    assert publish(book(released, CHANGES["points"][0], new)) == 1
    assert (points_of(released, "01-one"), points_of(released, "02-two")) == (2, 3)


def test_asked_to_it_changes_points_and_names_and_keeps_answers(released, capsys):
    hand_in(released)
    assert marking.run(book(released, tiny.EXERCISE, SECOND), released / "course", course.choose(
        book(released, tiny.EXERCISE, SECOND), ["01"]), False) == 0  # fmt: skip
    new = book(released, CHANGES["a new name"][0].replace("points: 2", "points: 7"), SECOND)
    assert publish(new, force=True) == 0
    assert points_of(released, "01-one") == 7
    assert (released / "course" / "submitted" / "ann" / "01-one" / "01-one.ipynb").is_file()
    assert (released / "course" / "gradebook.before-force.db").is_file()
    capsys.readouterr()
    assert marking.run(new, released / "course", course.choose(new, ["1"]), False) == 0
    assert "0 of 7 points" in capsys.readouterr().out  # what was handed in answers another exercise


def test_before_the_first_answer_points_may_change_and_are_named(released, capsys):
    assert publish(book(released, CHANGES["points"][0], SECOND)) == 0
    assert "01-one: changed since the last release: " + CHANGES["points"][1][0] in capsys.readouterr().out
    assert points_of(released, "01-one") == 5


def test_an_unchanged_chapter_is_released_again_without_a_word(released, capsys):
    hand_in(released)
    record_a_submission(released)
    assert publish(book(released, tiny.EXERCISE, SECOND)) == 0
    assert "changed since" not in capsys.readouterr().out
    with Gradebook(f"sqlite:///{released / 'course' / 'gradebook.db'}") as gradebook:
        assert [submission.student.id for submission in gradebook.assignment_submissions("01-one")] == ["ann"]


def test_one_chapter_of_two(tmp_path):
    made = book(tmp_path, tiny.EXERCISE, SECOND)
    assert publish(made, "02") == 0
    assert sorted(path.name for path in (tmp_path / "course" / "release").iterdir()) == ["02-two"]
    with pytest.raises(release.CourseError, match=r"There is no chapter '7'; there are 01, 02\."):
        publish(made, "7")


def test_a_release_that_fails_halfway_leaves_the_last_one(released, monkeypatch):
    before = contents(released / "course")
    generate = release.NbGraderAPI.generate_assignment

    def fail_at_the_second(self, slug, **options):
        return {"success": False, "error": "no space left"} if slug == "02-two" else generate(self, slug, **options)

    monkeypatch.setattr(release.NbGraderAPI, "generate_assignment", fail_at_the_second)
    with pytest.raises(ChapterError, match="02-two: nbgrader: no space left"):
        publish(book(released, tiny.EXERCISE.replace("Double", "Treble"), SECOND))
    assert contents(released / "course") == before


def test_a_gradebook_that_is_being_written_is_not_overwritten(released, monkeypatch):
    generate = release.NbGraderAPI.generate_assignment

    def meanwhile(self, slug, **options):
        if slug == "02-two":
            record_a_submission(released)
        return generate(self, slug, **options)

    monkeypatch.setattr(release.NbGraderAPI, "generate_assignment", meanwhile)
    with pytest.raises(release.CourseError, match=r"gradebook.db changed meanwhile; nothing was released"):
        publish(book(released, tiny.EXERCISE, SECOND))
    with Gradebook(f"sqlite:///{released / 'course' / 'gradebook.db'}") as gradebook:
        assert len(gradebook.assignment_submissions("01-one")) == 1


def test_what_else_a_teacher_keeps_in_the_course_stays(released):
    own = released / "course" / "source" / "exam" / "exam.ipynb"
    own.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(), own)
    settings = released / "course" / "nbgrader_config.py"
    settings.write_text(settings.read_text() + "c.Validator.indent = '  '\n")
    publish(book(released, tiny.EXERCISE, SECOND))
    assert own.is_file()
    assert settings.read_text().endswith("c.Validator.indent = '  '\n")


def test_clean_keeps_a_course(released):
    hand_in(released)
    (released / "out" / "html").mkdir(parents=True)
    before = contents(released / "course")
    shutil.copy(ROOT / "Makefile", released)
    subprocess.run(["make", "clean"], cwd=released, capture_output=True, text=True, check=True)
    assert not (released / "out").exists()
    assert contents(released / "course") == before


def test_clean_refuses_to_delete_a_course_of_an_earlier_version(tmp_path):
    (tmp_path / "out" / "course").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)
    report = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert report.returncode != 0
    assert "out/course holds grades" in report.stdout
    assert (tmp_path / "out" / "course").is_dir()


def test_help_builds_nothing(tmp_path):
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", tiny.EXERCISE)))
    report = tiny.run(root, "tools.course", "--help")
    assert report.returncode == 0
    assert "submitted/STUDENT/CHAPTER" in report.stdout
    assert not (root / "course").exists()


def test_what_cannot_be_graded_is_named_with_its_reason(released, capsys):
    place = released / "course"
    notebook = (place / "release" / "01-one" / "01-one.ipynb").read_text()
    for name, text in (
        ("ann/01-one/01-one (1).ipynb", notebook),  # as browsers name the second download
        ("bob/01/01-one.ipynb", notebook),
        ("eve/01-one/01-one.ipynb", "<html>Please log in</html>"),
        ("eve/01-one/.ipynb_checkpoints/01-one-checkpoint.ipynb", notebook),
        ("eve/exam/exam.ipynb", notebook),  # of an assignment of the lecturer's own
    ):
        (place / "submitted" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "submitted" / name).write_text(text)
    (place / "source" / "exam").mkdir()
    (place / "source" / "exam" / "exam.ipynb").write_text(notebook)
    made = book(released, tiny.EXERCISE, SECOND)
    assert marking.run(made, place, course.choose(made, []), False) == 1
    said = capsys.readouterr()
    assert "0 graded, 3 failed" in said.out
    lines = [line for line in said.err.splitlines() if "NOT GRADED" in line]
    assert len(lines) == 3
    assert lines[0].startswith("01-one  eve  NOT GRADED: nbformat.reader.NotJSONError: Notebook does not appear to be")
    assert lines[1].startswith("submitted/ann/01-one/01-one (1).ipynb  NOT GRADED: a notebook counts in")
    assert lines[2].startswith("submitted/bob/01/01-one.ipynb  NOT GRADED: a notebook counts in")


@pytest.mark.parametrize("user", [0, 1000])
def test_the_formgrader_starts_in_a_container_too(released, monkeypatch, user):
    commands = []
    monkeypatch.setattr(course.os, "getuid", lambda: user)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(course.subprocess, "run", lambda command, **_: commands.append(command) or done)
    assert course.formgrader(released / "course") == 0
    assert ("--allow-root" in commands[0]) == (user == 0)


def test_no_course_yet(tmp_path):
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", tiny.EXERCISE)))
    for task in ("grade", "formgrader"):
        report = tiny.run(root, "tools.course", task)
        assert report.returncode == 1
        assert "There is no course in" in report.stderr


def test_exercises_that_need_their_whole_chapter_are_not_handed_out():
    real = manifest.load()
    whole = [chapter for chapter in real.chapters if chapter.course == "none"]
    assert whole
    assert not set(whole) & set(course.choose(real, []))
    with pytest.raises(release.CourseError, match="in the chapter itself and not handed out"):
        course.choose(real, [whole[0].slug])
