"""What students hand in: the exercises of a chapter, and of the chapter only what they need.

A prelude (`tools/prelude.py`) stands before the tasks, so that a submission is graded in the seconds of its own code.
Beside it `reading` is the chapter without its exercises. Both are plain Markdown with the numbers of the site.
"""

from __future__ import annotations

import copy
import textwrap

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbgrader.utils import is_grade, is_solution

from tools import exercises, prelude, source
from tools.exercises import Exercise
from tools.foundations import imports
from tools.manifest import Book, Chapter
from tools.numbers import Numbers
from tools.plain import Plain
from tools.rooms import BESIDE

PRELUDE = "prelude"  # the grade_id of the cell, which students cannot edit

INSTALL = """# Where the book is not installed, for instance in Colab, put the file named below beside this notebook.
import importlib.util

if importlib.util.find_spec("kfqn_core") is None:
    %pip install --quiet "./{wheel}[lab]\""""

HOW = """Answer where it says so and leave the other cells as they are. The cell below an answer in code says whether it
is right; when the notebook is graded, it may try further cases. The chapter itself is not needed to run this."""

OUTSIDE = f"""*Outside the book's repository the cells that read its folder `{BESIDE}` stop with an error; the exercises
of this chapter need nothing of it.*"""


def exercises_of(book: Book, chapter: Chapter) -> list[Exercise]:
    """The exercises; ChapterError if something is wrong with them."""
    notebook = source.read(book, chapter)
    found, problems = exercises.collect(chapter, notebook)
    if problems := problems + _reading_problems(notebook, found):
        raise source.ChapterError("\n".join(problems))
    return found


def teachers(book: Book, chapter: Chapter, numbers: Numbers, wheel: str | None) -> NotebookNode:
    """The notebook of the exercises with solutions, hidden tests and rubrics, as nbgrader wants its source."""
    tasks = exercises_of(book, chapter)
    render = Plain(numbers)
    cells = [new_markdown_cell(f"# Exercises of chapter {chapter.number}: {chapter.title}\n\n{HOW}")]
    cells += _install(wheel)
    cells.append(new_code_cell(_prelude(source.read(book, chapter), tasks), metadata=_locked(PRELUDE)))
    for task in tasks:
        cells += _exercise(task, numbers, render)
    return _notebook(book, cells)


def reading(book: Book, chapter: Chapter, numbers: Numbers, wheel: str | None) -> NotebookNode:
    """The chapter without exercises, to read and to run."""
    notebook = exercises.without_exercises(source.read(book, chapter))
    beside = any(BESIDE in imports(cell.source) for _, cell in source.code_cells(notebook))
    render = Plain(numbers)
    cells = render.notebook(notebook)
    first = next(cell for cell in cells if cell.cell_type == "markdown")
    heading, _, text = first.source.partition("\n")
    number = f"Chapter {chapter.number}: " if chapter.number else ""
    cells[: cells.index(first) + 1] = [
        new_markdown_cell(f"# {number}{heading.removeprefix('# ')}" + (f"\n\n{OUTSIDE}" if beside else "")),
        *_install(wheel),
        new_markdown_cell(text.strip()),
    ]
    if render.cited:
        cells.append(new_markdown_cell(f"## References\n\n{render.bibliography()}"))
    return _notebook(book, cells)


def _exercise(task: Exercise, numbers: Numbers, render: Plain) -> list[NotebookNode]:
    heading = f"## {numbers.labels[task.label]}: {task.title}\n\n*{task.facts}*"
    text, rubric, cells = render.text(task.task), task.rubric, []
    if rubric:
        text += f"\n\n**Written answer** ({rubric.points} points): {render.text(rubric.prompt)}"
        answer = new_markdown_cell(render.text(task.explanation))
        answer.metadata.nbgrader = _nbgrader(f"{task.label}-written", grade=True, solution=True, points=rubric.points)
        cells.append(answer)
    solution = new_code_cell(task.solution)
    solution.metadata.nbgrader = _nbgrader(task.label, solution=True)
    grader = new_code_cell(task.grader + _criteria(rubric, render))
    grader.metadata.nbgrader = _nbgrader(f"{task.label}-check", grade=True, locked=True, points=task.points)
    return [new_markdown_cell(f"{heading}\n\n{text}"), *cells, solution, grader]


def _criteria(rubric: exercises.Rubric | None, render: Plain) -> str:
    """The rubric where whoever marks by hand sees it and students do not: in the hidden part of the grader."""
    if rubric is None:
        return ""
    lines = [
        line
        for points, text in rubric.criteria  # wrapped, since whoever marks reads them in a box that does not
        for line in textwrap.wrap(f"# {points} for: {render.text(text)}", 88, subsequent_indent="#     ")
    ]
    return "\n### BEGIN HIDDEN TESTS\n# The written answer:\n" + "\n".join(lines) + "\n### END HIDDEN TESTS"


def _nbgrader(grade_id: str, **more: object) -> NotebookNode:
    plain = {"grade": False, "solution": False, "locked": False, "task": False, "schema_version": 3}
    return NotebookNode(plain | {"grade_id": grade_id} | more)


def _locked(grade_id: str) -> NotebookNode:
    return NotebookNode(nbgrader=_nbgrader(grade_id, locked=True), jupyter={"source_hidden": True})


def _install(wheel: str | None) -> list[NotebookNode]:
    return [new_code_cell(INSTALL.format(wheel=wheel))] if wheel else []


def _notebook(book: Book, cells: list[NotebookNode]) -> NotebookNode:
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": book.kernel, "display_name": "Python 3", "language": "python"}
    notebook.metadata.language_info = {"name": "python"}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # the same notebook for the same text
    return copy.deepcopy(notebook)


def _prelude(notebook: NotebookNode, tasks: list[Exercise]) -> str:
    """Imports, definitions and values of the chapter that solutions and graders use."""
    wanted, answered = {"torch"}, set()
    for task in tasks:
        wanted |= (prelude.free_names(task.solution) | prelude.free_names(task.grader)) - answered
        answered |= prelude.bound_names(task.solution)
    kept = prelude.needed(_chapters_own(notebook), wanted - answered)
    return _layout(kept) or "import torch"


def _chapters_own(notebook: NotebookNode) -> list[prelude.Statement]:
    """The statements of a chapter that belong to no exercise."""
    cells = [cell for _, cell in source.code_cells(notebook) if not is_solution(cell) and not is_grade(cell)]
    return [statement for cell in cells for statement in prelude.statements(cell.source)]


def _layout(statements: list[prelude.Statement]) -> str:
    """Imports together, definitions apart."""
    text = ""
    for before, statement in zip([None, *statements], statements, strict=False):
        apart = before and (before.is_block or statement.is_block or before.imports != statement.imports)
        text += ("\n\n" if apart else "\n") + statement.source
    return text.strip()


def _reading_problems(notebook: NotebookNode, tasks: list[Exercise]) -> list[str]:
    """A grader reads what the stub names, what it imports itself, and what the chapter defines: nothing else, and
    nothing that a student could replace by chance."""
    chapter = _chapters_own(notebook)
    imported = {name for statement in chapter if statement.imports for name in statement.binds}
    defined = {name for statement in chapter for name in statement.binds} - imported
    problems = []
    for task in tasks:
        named, answers = prelude.bound_names(task.stub), prelude.bound_names(task.solution)
        for name in sorted(prelude.free_names(task.grader)):
            if name in answers and name not in named:
                problems.append(f"{task.where}: the grader reads {name}, which the stub does not name")
            elif name in imported and name not in named:
                problems.append(f"{task.where}: the grader reads {name}: import it there, a student may replace it")
            elif name not in named | defined | imported:
                problems.append(f"{task.where}: the grader reads {name}, which nobody defines")
        problems += [
            f"{task.where}: {name} is also a name of the chapter that a grader needs"
            for name in sorted(answers & _needed_names(chapter, tasks))
        ]
    return problems


def _needed_names(chapter: list[prelude.Statement], tasks: list[Exercise]) -> set[str]:
    wanted = {name for task in tasks for name in prelude.free_names(task.grader) - prelude.bound_names(task.solution)}
    return {name for statement in prelude.needed(chapter, wanted) for name in statement.binds}
