"""Exercises: one source carries the task, the executed solution and the grader.

The solution cell of exercise `ex-name` has `grade_id: ex-name`, its grader `grade_id: ex-name-check`. What a student
starts from is made by nbgrader itself.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

from nbformat import NotebookNode
from nbgrader.preprocessors import ClearSolutions
from nbgrader.utils import is_grade, is_solution

from tools import source
from tools.manifest import Chapter

GATE = re.compile(r"^:{3,}\{solution-(start|end)\}.*\n(?::[\w-]+:.*\n)*:{3,}[ \t]*$\n?", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    label: str
    title: str
    where: str  # names the solution cell in messages
    solution: str
    stub: str
    grader: str


def clear_solutions(notebook: NotebookNode) -> NotebookNode:
    """The notebook with nbgrader's stubs in place of its solutions."""
    return ClearSolutions().preprocess(copy.deepcopy(notebook), {})[0]


def collect(chapter: Chapter, notebook: NotebookNode) -> tuple[list[Exercise], list[str]]:
    """The exercises of a chapter, and what is wrong with them."""
    problems = []
    graded: dict[str, tuple[int, NotebookNode, str]] = {}
    numbered = source.code_cells(notebook)
    for (number, cell), (_, cleared) in zip(numbered, source.code_cells(clear_solutions(notebook)), strict=True):
        if is_solution(cell) or is_grade(cell):
            graded[cell.metadata.nbgrader.grade_id] = number, cell, cleared.source

    exercises = []
    for task in source.directives(notebook):
        if task.name not in ("exercise", "exercise-start"):
            continue
        name = f"{chapter.slug}, exercise {task.label or task.title!r}"
        if task.name == "exercise" or task.label is None:
            problems.append(f"{name}: write it as {{exercise-start}} with a label")
            continue
        solution, grader = graded.pop(task.label, None), graded.pop(f"{task.label}-check", None)
        if solution is None or not is_solution(solution[1]):
            problems.append(f"{name}: no solution cell with grade_id {task.label}")
        elif grader is None or not is_grade(grader[1]):
            problems.append(f"{name}: no grader cell with grade_id {task.label}-check")
        elif grader[0] < solution[0]:
            problems.append(f"{name}: the grader stands before the solution")
        elif "### BEGIN SOLUTION" not in solution[1].source:  # nbgrader would cut the whole cell, signature and all
            problems.append(f"{name}: no ### BEGIN SOLUTION in the solution cell")
        else:
            where = source.describe(chapter, *solution[:2])
            exercises.append(Exercise(task.label, task.title, where, solution[1].source, solution[2], grader[1].source))
    problems += [f"{chapter.slug}: nbgrader cell {grade_id} belongs to no exercise" for grade_id in graded]
    return exercises, problems


def without_explanations(notebook: NotebookNode) -> NotebookNode:
    """Cut everything between the solution gates but the graded cells, whose solutions nbgrader replaces."""
    kept = copy.deepcopy(notebook)
    kept.cells, inside = [], False
    for cell in copy.deepcopy(notebook.cells):
        if cell.cell_type == "markdown":
            text, end = "", 0
            for gate in GATE.finditer(cell.source):
                text += "" if inside else cell.source[end : gate.start()]
                inside, end = gate[1] == "start", gate.end()
            cell.source = (text + ("" if inside else cell.source[end:])).strip()
            if cell.source:
                kept.cells.append(cell)
        elif not inside or is_solution(cell):
            kept.cells.append(cell)
    return kept
