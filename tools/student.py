"""An nbgrader course: notebooks without solutions in `out/student`, the teacher's side in `out/course`.

A teacher collects answers in `out/course/submitted/STUDENT/CHAPTER/CHAPTER.ipynb` and grades them there with
`nbgrader autograde CHAPTER`. A new release is made beside the last one and takes its place when all of it is there;
once answers have come in, one that would change exercises or their points is refused.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.utils import is_grade
from traitlets.config import Config

from tools import exercises, manifest, source
from tools.manifest import Book

CELL_S = 600  # a student's cell that takes longer is stopped: it hangs

SETTINGS = """c = get_config()
c.CourseDirectory.course_id = {course_id!r}
c.CourseDirectory.root = {root!r}
c.CourseDirectory.release_directory = {release!r}
c.Execute.timeout = {timeout_s}
"""


class CourseError(Exception):
    """A release that would damage a course that has started."""


def build(book: Book) -> list[Path]:
    """Write the course and return the notebooks that students get; if anything fails, all is as it was."""
    # nbgrader starts its helpers by name, wherever it was itself started from.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    course, release = book.root / "out" / "course", book.root / "out" / "student"
    course.mkdir(parents=True, exist_ok=True)
    assignments = _assignments(book)
    with TemporaryDirectory(prefix="course-", dir=book.root / "out") as place:
        new = Path(place)
        seen = _copy_gradebook(course / "gradebook.db", new / "gradebook.db")
        changes = _changes(new / "gradebook.db", assignments, book.title)
        if changes and _has_started(course, new / "gradebook.db", book.title):
            raise CourseError(
                "This course has started, and the new release would change what students are graded by:\n"
                + "\n".join(changes)
                + f"\nNothing was changed. Release from the version of the book that the course started with, or move "
                f"{course} and {release} away to start a new course."
            )
        for change in changes:
            print(f"Changed since the last release: {change}", file=sys.stderr)
        _generate(book.title, new, assignments)

        if _state(course / "gradebook.db") != seen:
            raise CourseError(f"{course / 'gradebook.db'} changed meanwhile; nothing was released, please try again.")
        if assignments:  # into the file that is there, in one transaction: a grader may have it open
            with closing(_connect(new / "gradebook.db")) as made, closing(_connect(course / "gradebook.db")) as live:
                made.backup(live)
        for slug in assignments:
            _swap(new / "source" / slug, course / "source" / slug, new / "old")
            _swap(new / "release" / slug, release / slug, new / "old")
    settings = SETTINGS.format(course_id=book.title, root=str(course), release=str(release), timeout_s=CELL_S)
    (course / "nbgrader_config.py").write_text(settings, encoding="utf-8")
    return [release / slug / f"{slug}.ipynb" for slug in assignments]


def _assignments(book: Book) -> dict[str, NotebookNode]:
    """Chapters with exercises, as the teacher's notebooks."""
    found = {}
    for chapter in book.chapters:
        notebook = source.read(book, chapter)
        tasks, problems = exercises.collect(chapter, notebook)
        if problems:
            raise source.ChapterError("\n".join(problems))
        if tasks:
            found[chapter.slug] = exercises.without_explanations(notebook)
    return found


def _generate(course_id: str, place: Path, assignments: dict[str, NotebookNode]) -> None:
    """Let nbgrader fill `place`, a course of its own."""
    config = Config()
    config.CourseDirectory.course_id, config.CourseDirectory.root = course_id, str(place)
    api = NbGraderAPI(config=config)
    for slug, notebook in assignments.items():
        path = place / "source" / slug / f"{slug}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
        outcome = api.generate_assignment(slug)
        if not outcome["success"]:
            raise source.ChapterError(f"{slug}: nbgrader: {outcome.get('error') or outcome.get('log')}")


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


def _changes(database: Path, assignments: dict[str, NotebookNode], course_id: str) -> list[str]:
    """How the exercises differ from those of the last release."""
    if not database.exists():
        return []
    changes = []
    with Gradebook(f"sqlite:///{database}", course_id) as gradebook:
        for slug, notebook in assignments.items():
            try:
                (released,) = gradebook.find_assignment(slug).notebooks
            except (MissingEntry, ValueError):
                continue  # not released yet
            before = {cell.name: cell.max_score for cell in released.grade_cells}
            graders = [cell.metadata.nbgrader for cell in notebook.cells if is_grade(cell)]
            now = {grader.grade_id: grader.points for grader in graders}
            for name in sorted(before.keys() | now.keys()):
                points = [f"{found[name]:g} points" if name in found else "not there" for found in (before, now)]
                if points[0] != points[1]:
                    changes.append(f"{slug}, {name.removesuffix('-check')}: {points[0]} before, {points[1]} now")
    return changes


def _has_started(course: Path, database: Path, course_id: str) -> bool:
    """Did anybody hand in an answer?"""
    if any((course / "submitted").rglob("*.ipynb")):
        return True
    with Gradebook(f"sqlite:///{database}", course_id) as gradebook:
        return any(assignment.submissions for assignment in gradebook.assignments)


def _swap(new: Path, place: Path, old: Path) -> None:
    """Put the folder `new` where `place` is."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m tools.student", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        released = build(manifest.load())
    except (manifest.ManifestError, source.ChapterError, CourseError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in released))
    return 0


if __name__ == "__main__":
    sys.exit(main())
