"""Exercises: one source carries the task, the executed solution, the grader, and the points of a written answer.

The solution cell of exercise `ex-name` has `grade_id: ex-name`, its grader `grade_id: ex-name-check`; beside `nbgrader`
the solution cell says `level` (1 to 3) and `minutes`. An admonition of class `rubric` inside the solution asks for an
answer in words. What a student starts from is made by nbgrader itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode
from nbgrader.preprocessors import ClearSolutions
from nbgrader.utils import is_grade, is_solution

from tools import source
from tools.manifest import Chapter

LEVELS = (1, 2, 3)
TASK = re.compile(
    r"^:{3,}\{exercise-start\}[ \t]*(?P<title>[^\n]*)\n:label:[ \t]*(?P<label>\S+)\n:{3,}[ \t]*\n(?P<text>.*?)"
    r"^:{3,}\{exercise-end\}[ \t]*\n:{3,}[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
GATE = re.compile(
    r"^:{3,}\{solution-(?P<side>start|end)\}[ \t]*(?P<label>\S*).*\n(?::[\w-]+:.*\n)*:{3,}[ \t]*$\n?", re.MULTILINE
)
RUBRIC = re.compile(
    r"^(?P<fence>:{3,})\{admonition\}[ \t]*(?P<title>[^\n]*)\n:class: rubric\n(?P<text>.*?)^(?P=fence)[ \t]*$\n?",
    re.MULTILINE | re.DOTALL,
)
HIDDEN = re.compile(
    r"^[ \t]*### BEGIN HIDDEN TESTS.*?^[ \t]*### END HIDDEN TESTS[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL
)
CRITERION = re.compile(r"^\* (?:(\d+): )?(.*?)(?=^\* |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Rubric:
    """What a written answer is asked for, and what its points are given for."""

    prompt: str
    criteria: tuple[tuple[int, str], ...]

    @property
    def points(self) -> int:
        return sum(points for points, _ in self.criteria)


@dataclass(frozen=True)
class Exercise:
    label: str
    title: str
    task: str  # MyST, as it stands in the chapter
    where: str  # names the solution cell in messages
    number: int  # of the solution cell among the code cells of the chapter
    solution: str
    stub: str
    grader: str  # with its hidden tests
    points: int  # of the code
    level: int
    minutes: int
    explanation: str  # MyST, what the solution says in words
    rubric: Rubric | None

    @property
    def total(self) -> int:
        return self.points + (self.rubric.points if self.rubric else 0)

    @property
    def facts(self) -> str:
        """One line for readers: points, difficulty, minutes."""
        parts = [_count(self.points, "point")]
        if self.rubric:
            parts = [f"{_count(self.points, 'point')} for the code, {self.rubric.points} for the written answer"]
        stars = "★" * self.level + "☆" * (LEVELS[-1] - self.level)
        return " · ".join([*parts, f"difficulty {stars}", f"about {self.minutes} minutes"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def clear_solutions(notebook: NotebookNode) -> NotebookNode:
    """The notebook with nbgrader's stubs in place of its solutions."""
    return ClearSolutions().preprocess(copy.deepcopy(notebook), {})[0]


def visible(grader: str) -> str:
    """The grader as students see it, without its hidden tests."""
    return HIDDEN.sub("", grader).rstrip()


def collect(chapter: Chapter, notebook: NotebookNode) -> tuple[list[Exercise], list[str]]:
    """The exercises of a chapter, and what is wrong with them."""
    problems = []
    graded: dict[str, tuple[int, NotebookNode, str]] = {}
    numbered = source.code_cells(notebook)
    for (number, cell), (_, cleared) in zip(numbered, source.code_cells(clear_solutions(notebook)), strict=True):
        if is_solution(cell) or is_grade(cell):
            graded[cell.metadata.nbgrader.grade_id] = number, cell, cleared.source

    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    tasks = {match["label"]: match["text"].strip() for text in texts for match in TASK.finditer(text)}
    explanations = _explanations(notebook)
    exercises = []
    for task in source.directives(notebook):
        if task.name not in ("exercise", "exercise-start"):
            continue
        name = f"{chapter.slug}, exercise {task.label or task.title!r}"
        if task.name == "exercise" or task.label is None:
            problems.append(f"{name}: write it as {{exercise-start}} with a label")
            continue
        solution, grader = graded.pop(task.label, None), graded.pop(f"{task.label}-check", None)
        explanation = explanations.get(task.label, "")
        if task.label not in tasks:
            problems.append(f"{name}: no {{exercise-end}} before the next code cell")
        elif solution is None or not is_solution(solution[1]):
            problems.append(f"{name}: no solution cell with grade_id {task.label}")
        elif grader is None or not is_grade(grader[1]):
            problems.append(f"{name}: no grader cell with grade_id {task.label}-check")
        elif grader[0] < solution[0]:
            problems.append(f"{name}: the grader stands before the solution")
        elif "### BEGIN SOLUTION" not in solution[1].source:  # nbgrader would cut the whole cell, signature and all
            problems.append(f"{name}: no ### BEGIN SOLUTION in the solution cell")
        elif wrong := _cost_problem(solution[1]) or _rubric_problem(explanation):
            problems.append(f"{name}: {wrong}")
        else:
            exercises.append(
                Exercise(
                    label=task.label,
                    title=task.title,
                    task=tasks[task.label],
                    where=source.describe(chapter, *solution[:2]),
                    number=solution[0],
                    solution=solution[1].source,
                    stub=solution[2],
                    grader=grader[1].source,
                    points=grader[1].metadata.nbgrader.points,
                    level=solution[1].metadata.level,
                    minutes=solution[1].metadata.minutes,
                    explanation=RUBRIC.sub("", explanation).strip(),
                    rubric=_rubric(explanation),
                )
            )
    problems += [f"{chapter.slug}: nbgrader cell {grade_id} belongs to no exercise" for grade_id in graded]
    return exercises, problems


def _cost_problem(solution: NotebookNode) -> str | None:
    if solution.metadata.get("level") not in LEVELS:
        return f"the solution cell needs `level: 1`, 2 or 3, and says {solution.metadata.get('level')!r}"
    minutes = solution.metadata.get("minutes")
    if type(minutes) is not int or minutes <= 0:
        return f"the solution cell needs `minutes`, the time a student takes, and says {minutes!r}"
    return None


def _rubric(explanation: str) -> Rubric | None:
    match = RUBRIC.search(explanation)
    if match is None:
        return None
    criteria = [(int(points or 0), " ".join(text.split())) for points, text in CRITERION.findall(match["text"])]
    return Rubric(match["title"].removeprefix("The written answer:").strip(), tuple(criteria))


def _rubric_problem(explanation: str) -> str | None:
    rubric = _rubric(explanation)
    if rubric is None:
        return None
    if not rubric.prompt:
        return "the rubric has no title: say which part is answered in words"
    if not rubric.criteria or not all(points > 0 for points, _ in rubric.criteria):
        return "every line of the rubric is `* POINTS: what they are given for`"
    return None


def _solution_parts(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, str | None, str]]:
    """Every cell, markdown cut at the gates: the cell, the exercise whose solution it is part of, and its text."""
    label = None
    for cell in notebook.cells:
        end = 0
        if cell.cell_type == "markdown":
            for gate in GATE.finditer(cell.source):
                yield cell, label, cell.source[end : gate.start()]
                label, end = gate["label"] if gate["side"] == "start" else None, gate.end()
        yield cell, label, cell.source[end:]


def _explanations(notebook: NotebookNode) -> dict[str, str]:
    """What the solution of each exercise says in words."""
    found: dict[str, str] = {}
    for cell, label, text in _solution_parts(notebook):
        if label is not None and cell.cell_type == "markdown":
            found[label] = found.get(label, "") + text
    return found


def without_exercises(notebook: NotebookNode) -> NotebookNode:
    """The notebook without tasks, solutions and graders."""
    kept = copy.deepcopy(notebook)
    kept.cells = []
    for cell, label, text in _solution_parts(notebook):
        if label is not None or is_grade(cell):
            continue
        text = TASK.sub("", text).strip()
        if text:
            kept.cells.append(NotebookNode(copy.deepcopy(cell) | {"source": text}))
    return kept
