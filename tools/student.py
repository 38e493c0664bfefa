"""An nbgrader course: notebooks without solutions in `out/student`, the teacher's side in `out/course`.

    python -m tools.student

A teacher collects answers in `out/course/submitted/STUDENT/CHAPTER/CHAPTER.ipynb` and grades them there with
`nbgrader autograde CHAPTER`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

from tools import exercises, manifest, source
from tools.manifest import Book

SETTINGS = """c = get_config()
c.CourseDirectory.course_id = {course_id!r}
c.CourseDirectory.root = {root!r}
c.CourseDirectory.release_directory = {release!r}
c.Execute.timeout = {timeout_s}
"""


def build(book: Book) -> list[Path]:
    """Write the course and return the notebooks that students get."""
    # nbgrader starts its helpers by name, wherever it was itself started from.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    course, release = book.root / "out" / "course", book.root / "out" / "student"
    course.mkdir(parents=True, exist_ok=True)
    timeout_s = max(chapter.timeout_s for chapter in book.chapters)
    settings = SETTINGS.format(course_id=book.title, root=str(course), release=str(release), timeout_s=timeout_s)
    (course / "nbgrader_config.py").write_text(settings, encoding="utf-8")
    config = Config()
    config.CourseDirectory.course_id, config.CourseDirectory.root = book.title, str(course)
    config.CourseDirectory.release_directory = str(release)
    api = NbGraderAPI(config=config)

    released = []
    for chapter in book.chapters:
        notebook = source.read(book, chapter)
        found, problems = exercises.collect(chapter, notebook)
        if problems:
            raise source.ChapterError("\n".join(problems))
        if not found:
            continue
        path = course / "source" / chapter.slug / f"{chapter.slug}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(exercises.without_explanations(notebook), path)
        outcome = api.generate_assignment(chapter.slug, force=True)
        if not outcome["success"]:
            raise source.ChapterError(f"{chapter.slug}: nbgrader: {outcome.get('error') or outcome.get('log')}")
        released.append(release / chapter.slug / f"{chapter.slug}.ipynb")
    return released


def main() -> int:
    try:
        released = build(manifest.load())
    except (manifest.ManifestError, source.ChapterError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(str(path) for path in released))
    return 0


if __name__ == "__main__":
    sys.exit(main())
