"""Run what students handed in, and write feedback."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

from nbgrader.api import Gradebook, MissingEntry
from sqlalchemy.exc import SAWarning

from tools.manifest import Book, Chapter
from tools.release import CourseError, api


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
    print(f"{graded} graded, {failed} failed; feedback is in {place / 'feedback'}")
    return 1 if failed else 0


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
    text = str(outcome.get("error") or outcome.get("log") or "nbgrader does not say why")
    return text.strip().splitlines()[-1]
