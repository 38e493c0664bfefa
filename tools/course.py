"""The course that a lecturer runs from the book: exercises to hand out, answers to grade.

    python -m tools.course release [CHAPTER ...]   write what students get (01 or 01-kronecker-algebra; default: all)
    python -m tools.course grade [CHAPTER ...]     run what they handed in, and write feedback
    python -m tools.course formgrader              open nbgrader's formgrader on the course

A course is a folder of nbgrader, `course/` beside the book or the one of --course:

    release/CHAPTER/      hand this out: the exercises, and the package as a file that pip installs
    chapters/             the chapters as notebooks to read and run, without exercises
    submitted/STUDENT/CHAPTER/CHAPTER.ipynb    put answers here; the names of the folders are the roster
    feedback/STUDENT/CHAPTER/CHAPTER.html      return this
    source/, autograded/, gradebook.db         nbgrader's own
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools import manifest, marking, release, source
from tools.manifest import Book, Chapter


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.course", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("release", "grade", "formgrader"))
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="by number or name; default: all")
    parser.add_argument("--course", type=Path, default=None, help="the folder of the course; default: course/")
    parser.add_argument(
        "--force",
        action="store_true",
        help="release: change chapters that were handed in already; grade: run again what has not changed",
    )
    options = parser.parse_args(arguments)
    # nbgrader starts its helpers by name, wherever it was itself started from.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        book = manifest.load()
        place = (options.course or book.root / "course").resolve()
        if options.task == "formgrader":
            return formgrader(place)
        chosen = choose(book, options.chapters)
        task = release.run if options.task == "release" else marking.run
        return task(book, place, chosen, options.force)
    except (manifest.ManifestError, source.ChapterError, release.CourseError) as error:
        print(error, file=sys.stderr)
        return 1


def choose(book: Book, names: list[str]) -> list[Chapter]:
    """The chapters of these names or numbers; without names all that have a number and exercises to hand out.

    Raises:
        CourseError: for a chapter that there is not, or whose exercises are not handed out.
    """
    numbered = [chapter for chapter in book.chapters if chapter.number is not None]
    if not names:
        return [chapter for chapter in numbered if chapter.course == "exercises"]
    known = {name: chapter for chapter in numbered for name in (chapter.slug, chapter.slug[:2], str(chapter.number))}
    for name in names:
        if name not in known:
            raise release.CourseError(
                f"There is no chapter {name!r}; there are {', '.join(chapter.slug[:2] for chapter in numbered)}."
            )
    chosen = [known[name] for name in dict.fromkeys(names)]
    for chapter in chosen:
        if chapter.course != "exercises":
            raise release.CourseError(
                f"The exercises of {chapter.slug} need results of the whole chapter, minutes of work: they are done in "
                "the chapter itself and not handed out. Name other chapters."
            )
    return chosen


def formgrader(place: Path) -> int:
    """Start JupyterLab on the course; its first page is the formgrader."""
    if not (place / "nbgrader_config.py").is_file():
        raise release.CourseError(f"There is no course in {place} yet: `make course` makes one.")
    if shutil.which("jupyter") is None:
        raise release.CourseError("There is no `jupyter` in this Python's environment: `make setup` installs it.")
    command = ["jupyter", "lab", "--ServerApp.default_url=/formgrader", f"--ServerApp.root_dir={place}"]
    if os.getuid() == 0:  # Jupyter refuses to run as root unless it is told that this is meant, as in every container
        command.append("--allow-root")
    return subprocess.run(command, cwd=place, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
