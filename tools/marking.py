"""Run what students handed in, and write feedback."""

from __future__ import annotations

import re
import sys
import time
import warnings
from pathlib import Path

from nbgrader.api import Gradebook, MissingEntry
from sqlalchemy.exc import SAWarning

from tools.manifest import Book, Chapter
from tools.release import CourseError, api

PLACE = (
    "a notebook counts in submitted/STUDENT/CHAPTER, both folder and file with the names of the release; "
    "move or rename it, and grade again"
)


def run(book: Book, place: Path, chosen: list[Chapter], force: bool) -> int:
    """Grade the `chosen` chapters; 1 if a submission could not be graded."""
    if not (place / "nbgrader_config.py").is_file():
        raise CourseError(f"There is no course in {place} yet: `make course` makes one.")
    warnings.filterwarnings("ignore", category=SAWarning, module="nbgrader")  # of its own making
    failed = graded = 0
    nbgrader = api(book, place)
    for chapter in chosen:
        slug = chapter.slug
        for submitted in sorted(place.glob(f"submitted/*/{slug}/{slug}.ipynb")):
            student = submitted.parents[1].name
            result = place / "autograded" / student / slug / f"{slug}.ipynb"
            made_from = [submitted, place / "source" / slug / f"{slug}.ipynb"]
            fresh = result.exists() and all(path.stat().st_mtime <= result.stat().st_mtime for path in made_from)
            if not fresh or force:
                start = time.perf_counter()
                outcome = nbgrader.autograde(slug, student, force=True)
                if not outcome["success"]:
                    failed += 1
                    print(f"{slug}  {student}  NOT GRADED: {_reason(outcome)}", file=sys.stderr)
                    continue
                graded += 1
                spent_s = time.perf_counter() - start
                print(f"{slug}  {student}  {_score(book, place, slug, student)}  in {spent_s:.0f} s")
            outcome = nbgrader.generate_feedback(slug, student, force=True)
            if not outcome["success"]:
                failed += 1
                print(f"{slug}  {student}  NO FEEDBACK: {_reason(outcome)}", file=sys.stderr)
    for notebook in strays(place):
        failed += 1
        print(f"{notebook.relative_to(place)}  NOT GRADED: {PLACE}", file=sys.stderr)
    print(f"{graded} graded, {failed} failed; feedback is in {place / 'feedback'}")
    return 1 if failed else 0


def strays(place: Path) -> list[Path]:
    """Notebooks below `submitted` that no assignment of the course has, such as "01-one (1).ipynb" of a browser."""
    found = []
    for notebook in sorted(place.glob("submitted/**/*.ipynb")):
        below = notebook.relative_to(place / "submitted").parts
        hidden = any(part.startswith(".") for part in below)  # such as .ipynb_checkpoints
        if not hidden and not (len(below) == 3 and place.joinpath("source", *below[1:]).is_file()):
            found.append(notebook)
    return found


def _score(book: Book, place: Path, slug: str, student: str) -> str:
    """What the graders gave, and what waits to be marked by hand."""
    with Gradebook(f"sqlite:///{place / 'gradebook.db'}", book.title) as gradebook:
        try:
            submission = gradebook.find_submission(slug, student)
        except MissingEntry:
            return "no grades"
        waiting = [grade for notebook in submission.notebooks for grade in notebook.grades if grade.needs_manual_grade]
        by_hand = f", {sum(grade.max_score for grade in waiting):g} of them to mark by hand" if waiting else ""
        return f"{submission.score:g} of {submission.max_score:g} points{by_hand}"


def _reason(outcome: dict[str, object]) -> str:
    """The error that nbgrader caught, which stands in its log; its own last words name none."""
    caught = re.findall(r"^ {4}([\w.]*[A-Z]\w*: .+)", str(outcome.get("log")), re.MULTILINE)
    text = str(outcome.get("error") or outcome.get("log") or "nbgrader does not say why")
    return caught[-1] if caught else text.strip().splitlines()[-1]
