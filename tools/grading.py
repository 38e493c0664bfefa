"""How nbgrader runs what students hand in: a dead kernel or an endless loop costs one cell.

nbgrader's own `Execute` gives a whole notebook up when its kernel dies. `ByCell` starts another kernel, runs again what
had passed, and goes on with the next cell. It also puts the prelude's definitions back before every grader, so that an
answer that happens to be called like a helper does not grade itself.
"""

from __future__ import annotations

import ast
import copy
from typing import Any

from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from nbgrader.utils import is_grade
from traitlets import Dict, Integer
from traitlets.config import Config

from tools.assignment import PRELUDE


class ByCell(Execute):
    """Runs a submission cell by cell, with a time for each cell that depends on the chapter."""

    seconds = Dict(value_trait=Integer(), help="seconds a cell may take, by assignment").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: dict[str, Any], km: Any = None) -> tuple[NotebookNode, Any]:
        self.timeout = self.seconds.get(resources["nbgrader"]["assignment"], self.timeout)
        self.interrupt_on_timeout = False  # a loop may swallow the interrupt: the kernel goes
        self.shutdown_kernel = "immediate"
        self.extra_arguments = ["--Application.log_level=ERROR"]  # that kernels talk over TCP is no news to a grader
        definitions = [_definitions(cell.source) for cell in nb.cells if _grade_id(cell) == PRELUDE]
        self.definitions = "\n".join(definitions)
        return super().preprocess(nb, resources, km)

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        try:
            try:
                return self._run(cell, resources, index)
            except DeadKernelError:  # perhaps the cell before had ordered it: exit() takes effect with a delay
                self._start_again(index)
                return self._run(cell, resources, index)
        except DeadKernelError:
            reason = "KernelDied", "the kernel died in this cell; the notebook went on in another one"
        except CellTimeoutError:
            reason = "CellTimeout", f"stopped after {self.timeout} seconds; the notebook went on in another kernel"
        cell.outputs = [*cell.get("outputs", []), new_output("error", ename=reason[0], evalue=reason[1])]
        cell.outputs[-1].traceback = [": ".join(reason)]
        self.nb.cells[index] = cell
        self._start_again(index)
        return cell, resources

    def _run(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        is_grader = is_grade(cell) and cell.cell_type == "code"
        if is_grader and self.definitions:
            self.execute_cell(new_code_cell(self.definitions), index, store_history=False)
        done = super().preprocess_cell(cell, resources, index)
        if is_grader:  # to nbgrader whatever a grader writes to stderr is a failure, a warning of a library too
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.name = "stdout"
        return done

    def _start_again(self, index: int, without: frozenset[int] = frozenset()) -> None:
        """Another kernel, in the state that the cells before `index` had left; those that failed are left out."""
        self._cleanup_kernel()
        self.km = self.create_kernel_manager()
        self.start_new_kernel()
        self.start_new_kernel_client()
        for i, cell in enumerate(self.nb.cells[:index]):
            if cell.cell_type != "code" or is_grade(cell) or any(out.output_type == "error" for out in cell.outputs):
                continue
            try:
                if i not in without:
                    self.execute_cell(copy.deepcopy(cell), i, store_history=False)
            except (DeadKernelError, CellTimeoutError):  # what passed once need not pass again
                return self._start_again(index, without | {i})
            finally:
                self.nb.cells[i] = cell  # with the outputs of its first run
        return None


class DropUnknown(NbGraderPreprocessor):
    """Cells of exercises that are no longer in the course are text: nbgrader has emptied what it had noted of them."""

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        if _grade_id(cell) is None:
            cell.metadata.pop("nbgrader", None)
        return cell, resources


def configure(config: Config, course_id: str, root: str, seconds: dict[str, int]) -> None:
    """Fill in the settings of a course; its `nbgrader_config.py` calls this, and so does `tools/course.py`."""
    from nbgrader.converters import Autograde

    config.CourseDirectory.course_id = course_id
    config.CourseDirectory.root = root
    steps = [ByCell if step is Execute else step for step in Autograde.autograde_preprocessors.default_args[0]]
    config.Autograde.autograde_preprocessors = steps
    *steps, last = Autograde.sanitize_preprocessors.default_args[0]  # the last looks for damage
    config.Autograde.sanitize_preprocessors = [*steps, DropUnknown, last]
    config.ByCell.seconds = seconds


def _grade_id(cell: NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def _definitions(code: str) -> str:
    """Imports, functions and classes alone: putting them back costs no time."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return "\n".join(ast.unparse(node) for node in ast.parse(code).body if isinstance(node, kinds))
