"""Every exercise stands on its own: behind the derived prelude the solution passes, and nothing else does."""

import os
import zipfile

import nbformat
import pytest
from nbclient import NotebookClient

from tools import assignment, exercises, manifest, numbers, release
from tools.manifest import ROOT

BOOK = manifest.load()
NUMBERS = numbers.of(BOOK)
WITH_EXERCISES = [chapter for chapter in BOOK.chapters if chapter.number is not None and chapter.course == "exercises"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("chapter", WITH_EXERCISES, ids=lambda chapter: chapter.slug)
def test_solutions_get_full_points_and_nothing_else_does(chapter, tmp_path):
    notebook = assignment.teachers(BOOK, chapter, NUMBERS, wheel=None)
    wide = [line for cell in notebook.cells if "HIDDEN" in cell.source for line in cell.source.splitlines()]
    assert max(map(len, wide), default=0) <= 95, "whoever marks by hand reads it in a box of this width"
    trials = [f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom tools.verification import *"]
    for task in assignment.exercises_of(BOOK, chapter):
        arguments = f"globals(), {task.where!r}, {task.solution!r}"
        trials.append(f"stub_must_fail({arguments}, {task.stub!r}, {task.grader!r})")
        trials.append(f"lazy_must_fail({arguments}, {exercises.visible(task.grader)!r}, {task.grader!r})")
    notebook.cells += [nbformat.v4.new_code_cell(trial) for trial in trials]
    # A folder outside the repository, and of the repository the package alone: what students have.
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "kfqn_core").symlink_to(ROOT / "kfqn_core")
    client = NotebookClient(notebook, timeout=300, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(tmp_path / "package")})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    errors = [output.evalue for output in outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors)


def test_students_get_the_package_as_one_file(tmp_path):
    inside = zipfile.ZipFile(release.pack(BOOK, tmp_path)).namelist()
    assert {"kfqn_core/__init__.py", "kfqn_core/lab/checks.py"} <= set(inside)
    assert not [name for name in inside if name.startswith(("tools", "benchmarks", "tests"))]
