"""The teaching page keeps what it promises: plans follow what chapters build on, and its numbers are the exercises'."""

import re

import pytest

from tools import assignment, manifest
from tools.manifest import ROOT

BOOK = manifest.load()
PAGE = (BOOK.src / "teaching.md").read_text(encoding="utf-8")
NUMBERED = {chapter.slug: chapter for chapter in BOOK.chapters if chapter.number is not None}


def rows(heading):
    """The rows below a table's heading."""
    lines = PAGE[PAGE.index(heading) :].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            return table
        table.append([field.strip() for field in line.strip("|").split("|")])
    return table


@pytest.mark.parametrize(("heading", "lectures"), [("| Lecture | Chapter | At", 6), ("| Lecture | Chapter | The", 12)])
def test_a_plan_keeps_what_chapters_build_on_before_them(heading, lectures):
    plan = [re.search(r"\{doc\}`([\w-]+)`", row[1])[1] for row in rows(heading)]
    assert len(plan) == lectures
    for i, slug in enumerate(plan):
        assert set(NUMBERED[slug].requires) <= set(plan[:i])


def test_the_facts_are_those_of_the_exercises():
    facts = rows("| Chapter | Builds on |")
    assert len(facts) == len(NUMBERED)
    for (name, builds_on, _, count, points, minutes, _), chapter in zip(facts, NUMBERED.values(), strict=True):
        tasks = assignment.exercises_of(BOOK, chapter)
        words = sum(task.rubric.points for task in tasks if task.rubric)
        assert name == f"{{doc}}`{chapter.slug}`"
        assert builds_on == (", ".join(str(NUMBERED[slug].number) for slug in chapter.requires) or "nothing")
        assert count == str(len(tasks))
        assert points == f"{sum(task.points for task in tasks)} + {words}"
        assert minutes == str(sum(task.minutes for task in tasks))


def test_its_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z]+)", PAGE)):
        assert f"\n{target}: " in makefile, target
