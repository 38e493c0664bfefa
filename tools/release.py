"""Write what students get of a course; what they have answered is never changed without being asked.

A release is made beside the last one and takes its place when all of it is there. Once somebody has handed in a
chapter, a release that would change it is refused, with what would change in one sentence for each exercise.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.utils import is_grade
from traitlets.config import Config

from tools import assignment, grading, numbers, source
from tools.manifest import Book, Chapter

SETTINGS = """# Written by the book's `make course`; what you add below the last line stays.
import os
import sys

sys.path.insert(0, {home!r})
from tools import grading

grading.configure(get_config(), {course_id!r}, os.path.dirname(os.path.abspath(__file__)), {seconds!r})
"""
LAST = "# ---- yours ----\n"


class CourseError(Exception):
    """A course that is not there, or that would be damaged."""


def run(book: Book, place: Path, chosen: list[Chapter], force: bool) -> int:
    """Release the `chosen` chapters into the course at `place`; 1 if one of them was left as it is."""
    counted = numbers.of(book)
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".release-", dir=place) as folder:
        new = Path(folder)
        wheel = pack(book, new / "wheel")
        notebooks = {
            chapter: assignment.teachers(book, chapter, counted, wheel.name if wheel else None)
            for chapter in chosen
            if assignment.exercises_of(book, chapter)
        }
        state = _copy_gradebook(place / "gradebook.db", new / "gradebook.db")
        released, kept = {}, []
        for chapter, notebook in notebooks.items():
            changes = _changes(place / "source" / chapter.slug / f"{chapter.slug}.ipynb", notebook)
            students = handed_in(book, place, chapter)
            if changes and students and not force:
                kept.append(chapter)
                print(f"{chapter.slug}: kept as it is, {_people(students)} handed it in. A new release would change:")
                print("\n".join(f"  {change}" for change in changes))
                continue
            if students and not changes:
                continue  # it is there
            if students:
                _forget_grades(new / "gradebook.db", book.title, chapter.slug)
            for change in changes:
                print(f"{chapter.slug}: changed since the last release: {change}")
            released[chapter] = notebook
        _generate(book, new, released, wheel)
        for chapter in chosen:
            copy = assignment.reading(book, chapter, counted, wheel.name if wheel else None)
            _write(new / "chapters" / f"{chapter.slug}.ipynb", copy)

        # Everything is there: from here on the last release is replaced.
        if _state(place / "gradebook.db") != state:
            raise CourseError(f"{place / 'gradebook.db'} changed meanwhile; nothing was released, please try again.")
        if released:  # into the file that is there, in one transaction: a grader may have it open
            if force and state is not None:
                shutil.copy(place / "gradebook.db", place / "gradebook.before-force.db")
            with closing(_connect(new / "gradebook.db")) as made, closing(_connect(place / "gradebook.db")) as live:
                made.backup(live)
        for chapter in released:
            for part in ("source", "release"):
                _swap(new / part / chapter.slug, place / part / chapter.slug, new / "old")
        (place / "chapters").mkdir(exist_ok=True)
        for notebook in [*(new / "chapters").iterdir(), *([wheel] if wheel else [])]:
            notebook.replace(place / "chapters" / notebook.name)
        _write_settings(book, place)
    for chapter in released:
        print(place / "release" / chapter.slug)
    if kept:
        print(f"Left as they are: {', '.join(chapter.slug for chapter in kept)}. FORCE=1 releases them all the same;")
        print("their answers stay, their grades are made anew by `make grade`, points given by hand are lost.")
    return 1 if kept else 0


def handed_in(book: Book, place: Path, chapter: Chapter) -> list[str]:
    """Students who handed in this chapter, or whose grades are in the gradebook."""
    found = {path.parent.name for path in place.glob(f"submitted/*/{chapter.slug}")}
    if (place / "gradebook.db").exists():
        with Gradebook(f"sqlite:///{place / 'gradebook.db'}", book.title) as gradebook, suppress(MissingEntry):
            found |= {entry.student.id for entry in gradebook.find_assignment(chapter.slug).submissions}
    return sorted(found)


def settings(book: Book) -> dict[str, int]:
    """Seconds that a student's cell may take, by chapter."""
    return {chapter.slug: chapter.grading_s for chapter in book.chapters if chapter.number is not None}


def api(book: Book, place: Path) -> NbGraderAPI:
    """nbgrader with the settings of the course."""
    config = Config()
    grading.configure(config, book.title, str(place), settings(book))
    return NbGraderAPI(config=config)


def _people(students: list[str]) -> str:
    return "one student has" if len(students) == 1 else f"{len(students)} students have"


def pack(book: Book, folder: Path) -> Path | None:
    """The package as one file, built from a copy so that nothing is left in the repository."""
    if not (book.root / "pyproject.toml").is_file():
        return None
    copy = folder / "copy"
    shutil.copytree(book.root / "kfqn_core", copy / "kfqn_core", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(book.root / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise CourseError(f"The package could not be packed for students:\n{built.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _generate(book: Book, place: Path, notebooks: dict[Chapter, NotebookNode], wheel: Path | None) -> None:
    """Let nbgrader fill `place`, a course of its own."""
    nbgrader = api(book, place)
    for chapter, notebook in notebooks.items():
        path = place / "source" / chapter.slug / f"{chapter.slug}.ipynb"
        _write(path, notebook)
        if wheel:
            shutil.copy(wheel, path.parent)
        outcome = nbgrader.generate_assignment(chapter.slug)
        if not outcome["success"]:
            raise source.ChapterError(f"{chapter.slug}: nbgrader: {outcome.get('error') or outcome.get('log')}")


def _write(path: Path, notebook: NotebookNode) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def _write_settings(book: Book, place: Path) -> None:
    path = place / "nbgrader_config.py"
    own = path.read_text(encoding="utf-8").partition(LAST)[2] if path.exists() else ""
    home = str(Path(__file__).resolve().parents[1])
    text = SETTINGS.format(home=home, course_id=book.title, seconds=settings(book))
    path.write_text(text + LAST + own, encoding="utf-8")


def _changes(last: Path, notebook: NotebookNode) -> list[str]:
    """How exercises differ from those of the last release, one sentence each; nothing if there is none."""
    if not last.exists():
        return []
    before, now = _by_exercise(nbformat.read(last, as_version=4)), _by_exercise(notebook)
    changes = []
    for name in sorted(before.keys() | now.keys()):
        (points, text), (new_points, new_text) = before.get(name, (None, "")), now.get(name, (None, ""))
        if points != new_points:
            old, new = (f"{value:g} points" if value is not None else "not there" for value in (points, new_points))
            changes.append(f"{name}: {old} before, {new} now.")
        elif text != new_text:
            same = f", for the same {points:g} points" if points else ""
            changes.append(f"{name}: another text, solution or grader{same}.")
    return changes


def _by_exercise(notebook: NotebookNode) -> dict[str, tuple[float, str]]:
    """Points and text of every exercise, and the text before the first; an exercise ends with its grader."""
    found: dict[str, tuple[float, str]] = {}
    text, points = "", 0.0
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id", "")
        text += f"{grade_id}\n{cell.source}\n"
        points += cell.metadata.nbgrader.points if is_grade(cell) else 0
        if grade_id == assignment.PRELUDE or (is_grade(cell) and cell.cell_type == "code"):
            name = "the first cells" if grade_id == assignment.PRELUDE else grade_id.removesuffix("-check")
            found[name], text, points = (points, text), "", 0.0
    return found


def _forget_grades(database: Path, course_id: str, slug: str) -> None:
    """nbgrader cannot change an assignment that has grades."""
    with Gradebook(f"sqlite:///{database}", course_id) as gradebook:
        for submission in gradebook.assignment_submissions(slug):
            gradebook.remove_submission(slug, submission.student.id)


def _connect(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(database, timeout=30)


def _state(database: Path) -> tuple[int, int] | None:
    return (database.stat().st_mtime_ns, database.stat().st_size) if database.exists() else None


def _copy_gradebook(live: Path, copy: Path) -> tuple[int, int] | None:
    """Copy what is there, and return the state it was in."""
    state = _state(live)
    if state is not None:
        with closing(_connect(live)) as there, closing(_connect(copy)) as here:
            there.backup(here)
    return state


def _swap(new: Path, place: Path, old: Path) -> None:
    """Put the folder `new` where `place` is."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)
