"""Chapters into executed notebooks.

A chapter is executed by nbmake in `out/running`; what passed moves to `out/notebooks`, so that a failing chapter leaves
the last good notebook where it was. The notebook carries a stamp of everything its outputs depend on, and is reused
while the stamp holds.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient.exceptions import DeadKernelError
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from nbmake.nb_result import NotebookError
from nbmake.nb_run import NotebookRun

from tools import exercises, foundations, ledger, source, verification
from tools.manifest import Book, Chapter
from tools.source import ChapterError

WIDGET = "application/vnd.jupyter.widget-view+json"
# A shell may name a backend for all of matplotlib (on clusters: Agg), and a matplotlibrc too: pictures go to the page.
BACKEND = "module://matplotlib_inline.backend_inline"


@dataclass(frozen=True)
class Timing:
    reading_s: float  # what a reader waits who runs the chapter
    verifying_s: float  # what the trials of checks and graders took on top


def published(book: Book, chapter: Chapter) -> Path:
    """Where the executed notebook of a chapter stands."""
    return book.root / "out" / "notebooks" / f"{chapter.slug}.ipynb"


def trials(chapter: Chapter, notebook: NotebookNode) -> list[str]:
    """Calls that break every check and try every grader on its stub."""
    calls = [
        f"check_must_fail(globals(), {check.where!r}, {check.source!r}, {check.broken_by!r})"
        for check in ledger.checks(chapter, notebook)[0]
    ]
    calls += [
        f"stub_must_fail(globals(), {exercise.where!r}, {exercise.solution!r}, {exercise.stub!r}, {exercise.grader!r})"
        for exercise in exercises.collect(chapter, notebook)[0]
    ]
    return calls


def stamp(book: Book, chapter: Chapter) -> str:
    """A hash of what the outputs of a chapter, and the verdict on its checks, depend on."""
    notebook = source.read(book, chapter)
    own = sorted((book.root / ledger.PACKAGE).rglob("*.py"))
    if f"from {ledger.BESIDE}" in nbformat.writes(notebook):
        own += sorted(path for path in (book.root / ledger.BESIDE).rglob("*") if path.suffix in (".py", ".jsonl"))
    code = [cell.source for _, cell in source.code_cells(notebook)]
    code += [path.read_text(encoding="utf-8") for path in own if path.suffix == ".py"]
    names = set().union(*map(foundations.imports, code))
    below = foundations.loose_files(names, known=(ledger.PACKAGE, ledger.BESIDE))

    contents = [*foundations.installed(), nbformat.writes(notebook), *trials(chapter, notebook)]
    digest = hashlib.sha256("\n".join(contents).encode())
    named = [(path.relative_to(book.root).as_posix(), path) for path in [*own, book.root / "constraints.txt"]]
    named += [(path.name, path) for path in [*below, Path(__file__), Path(verification.__file__)]]
    for name, path in named:
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_fresh(book: Book, chapter: Chapter) -> bool:
    """Was this very text executed with this very code?"""
    path = published(book, chapter)
    return path.is_file() and nbformat.read(path, as_version=4).metadata.get("stamp") == stamp(book, chapter)


def execute(book: Book, chapter: Chapter) -> Timing:
    """Run a chapter, verify its checks and graders, publish the executed notebook; ChapterError if anything fails."""
    notebook = source.read(book, chapter)
    own = len(notebook.cells)
    home = str(Path(__file__).resolve().parents[1])
    calls = [f"import sys; sys.path.insert(0, {home!r})\nfrom tools.verification import *", *trials(chapter, notebook)]
    notebook.cells += [nbformat.v4.new_code_cell(call) for call in calls]
    mark = stamp(book, chapter)

    path = book.root / "out" / "running" / f"{chapter.slug}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    start = time.perf_counter()
    try:
        with _environment(MPLBACKEND=BACKEND):
            result = NotebookRun(path, chapter.timeout_s).execute()
    except DeadKernelError:
        raise ChapterError(f"{chapter.slug}: the kernel died; is there enough memory?") from None
    total_s = time.perf_counter() - start
    executed = result.nb
    if result.error is not None:
        nbformat.write(executed, path)
        raise _explain(chapter, executed, own, result.error)

    verifying_s = sum(_seconds(cell) for cell in executed.cells[own:])
    executed.cells = executed.cells[:own]
    _must_show_its_figures(chapter, executed)
    for cell in executed.cells:
        cell.metadata.pop("execution", None)  # clock times: they differ from run to run
        if cell.cell_type == "code":
            # A progress bar is for whoever waits; stored, it is a widget that no page can show.
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    executed.metadata.pop("widgets", None)
    executed.metadata["stamp"] = mark
    nbformat.write(executed, path)
    target = published(book, chapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return Timing(total_s - verifying_s, verifying_s)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for the kernels that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _must_show_its_figures(chapter: Chapter, notebook: NotebookNode) -> None:
    """A figure's caption without its picture is no figure, though no cell failed."""
    for number, cell in source.code_cells(notebook):
        shown = {kind for output in cell.outputs for kind in output.get("data", {})}
        if "figure" in cell.metadata.get("mystnb", {}) and not any(kind.startswith("image/") for kind in shown):
            raise ChapterError(
                f"{source.describe(chapter, number, cell)}: its metadata say mystnb.figure, and no picture came out of "
                "it; does it end with plt.show(), and does nothing, in the chapter or in the settings of IPython, "
                "choose another backend of matplotlib?"
            )


def _seconds(cell: NotebookNode) -> float:
    begin, end = (cell.metadata.execution[key] for key in ("iopub.execute_input", "shell.execute_reply"))
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _explain(chapter: Chapter, notebook: NotebookNode, own: int, error: NotebookError) -> ChapterError:
    """Name chapter, cell and error."""
    index = error.failing_cell_index
    cell = notebook.cells[index]
    if index < own:
        number = sum(cell.cell_type == "code" for cell in notebook.cells[: index + 1])
        return ChapterError(f"{source.describe(chapter, number, cell)}: {strip_ansi(error.summary)}", error.trace)
    for output in cell.outputs:
        if output.output_type == "error":  # its message names the cell on trial
            return ChapterError(output.evalue)
    return ChapterError(f"{chapter.slug}, while trying {cell.source[:120]}: {strip_ansi(error.summary)}")
