"""Chapters into executed notebooks.

A chapter is executed in `out/running`; what passed moves to `out/notebooks`, so that a failing chapter leaves the last
good notebook where it was. The notebook carries a stamp of everything its outputs depend on, and is reused while the
stamp holds. One that failed stays in `out/running` with its reason.

python -m tools.notebooks    says what there is to execute
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode

from tools import exercises, foundations, ledger, manifest, rooms, scores, source, verification
from tools.manifest import Book, Chapter
from tools.source import ChapterError

WIDGET = "application/vnd.jupyter.widget-view+json"
# A shell may name a backend for all of matplotlib (on clusters: Agg), and a matplotlibrc too: pictures go to the page.
BACKEND = "module://matplotlib_inline.backend_inline"
EVERY_S = 5  # between two lines about how far a chapter is


@dataclass(frozen=True)
class Timing:
    reading_s: float  # what a reader waits who runs the chapter
    verifying_s: float  # what the trials of checks and graders took on top


@dataclass(frozen=True)
class Failure:
    index: int  # of the cell, among all cells
    summary: str
    trace: str


def published(book: Book, chapter: Chapter) -> Path:
    """Where the executed notebook of a chapter stands."""
    return book.root / "out" / "notebooks" / f"{chapter.slug}.ipynb"


def running(book: Book, chapter: Chapter) -> Path:
    """Where a chapter is executed, and where it stays if it fails."""
    return book.root / "out" / "running" / f"{chapter.slug}.ipynb"


def trials(chapter: Chapter, notebook: NotebookNode) -> list[str]:
    """Calls that break every check and try every grader on its stub."""
    calls = [
        f"check_must_fail(globals(), {check.where!r}, {check.source!r}, {check.broken_by!r}, {check.room!r})"
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
    own = sorted((book.root / rooms.PACKAGE).rglob("*.py"))
    if f"from {rooms.BESIDE}" in nbformat.writes(notebook):
        own += sorted(path for path in (book.root / rooms.BESIDE).rglob("*") if path.suffix in (".py", ".jsonl"))
    if scores.RECORDS.name in nbformat.writes(notebook):
        own.append(book.root / "tools" / scores.RECORDS.name)
    code = [cell.source for _, cell in source.code_cells(notebook)]
    code += [path.read_text(encoding="utf-8") for path in own if path.suffix == ".py"]
    names = set().union(*map(foundations.imports, code))
    below = foundations.loose_files(names, known=(rooms.PACKAGE, rooms.BESIDE))

    contents = [*foundations.installed(), nbformat.writes(notebook), *trials(chapter, notebook)]
    digest = hashlib.sha256("\n".join(contents).encode())
    named = [(path.relative_to(book.root).as_posix(), path) for path in [*own, book.root / "constraints.txt"]]
    named += [(path.name, path) for path in [*below, Path(__file__), Path(verification.__file__), Path(rooms.__file__)]]
    for name, path in named:
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_fresh(book: Book, chapter: Chapter) -> bool:
    """Was this very text executed with this very code?"""
    path = published(book, chapter)
    return path.is_file() and nbformat.read(path, as_version=4).metadata.get("stamp") == stamp(book, chapter)


def failure(book: Book, chapter: Chapter) -> str | None:
    """Why this very text failed when it was last executed with this very code; None if it did not."""
    path = running(book, chapter)
    if not path.is_file():
        return None
    metadata = nbformat.read(path, as_version=4).metadata
    return metadata.get("failure") if metadata.get("stamp") == stamp(book, chapter) else None


def execute(book: Book, chapter: Chapter, say: Callable[[str], None] = lambda line: None) -> Timing:
    """Run a chapter, verify its checks and graders, publish the executed notebook; ChapterError if anything fails.

    `say` hears how far it is: "08 K-BFGS and K-BFGS(L): cell 14/63, 3:10".
    """
    notebook = source.read(book, chapter)
    own = len(notebook.cells)
    home = str(Path(__file__).resolve().parents[1])
    calls = [f"import sys; sys.path.insert(0, {home!r})\nfrom tools.verification import *", *trials(chapter, notebook)]
    notebook.cells += [nbformat.v4.new_code_cell(call) for call in calls]
    notebook.metadata["stamp"] = stamp(book, chapter)

    path = running(book, chapter)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        timing = _execute(chapter, notebook, own, path.parent, say)
    except ChapterError as error:
        notebook.cells = notebook.cells[:own]
        _clean(notebook)
        notebook.metadata["failure"] = str(error)
        nbformat.write(notebook, path)
        raise
    _clean(notebook)
    nbformat.write(notebook, path)
    target = published(book, chapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return timing


def _execute(chapter: Chapter, notebook: NotebookNode, own: int, folder: Path, say: Callable[[str], None]) -> Timing:
    """Run the notebook, whose cells after the first `own` are trials, in place; leave its own cells."""
    start = time.perf_counter()
    try:
        with _environment(MPLBACKEND=BACKEND):
            failed = _run(notebook, folder, chapter.timeout_s, _progress(chapter, notebook, own, say))
    except DeadKernelError:
        raise ChapterError(f"{chapter.slug}: the kernel died; is there enough memory?") from None
    total_s = time.perf_counter() - start
    if failed is not None:
        raise _explain(chapter, notebook, own, failed)
    verifying_s = sum(_seconds(cell) for cell in notebook.cells[own:])
    notebook.cells = notebook.cells[:own]
    _must_show_its_figures(chapter, notebook)
    return Timing(total_s - verifying_s, verifying_s)


def _run(notebook: NotebookNode, folder: Path, timeout_s: int, started: Callable[[int], None]) -> Failure | None:
    """Execute every cell in place, in `folder`, up to the first that fails; `started` hears its number."""
    last = 0

    def on_cell_start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal last
        last = cell_index
        started(cell_index)

    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=timeout_s, record_timing=True, resources=place, on_cell_start=on_cell_start
    )
    try:
        client.execute()
    except CellTimeoutError as error:
        return Failure(last, str(error).splitlines()[0], str(error))
    except CellExecutionError:
        error = next(output for output in notebook.cells[last].outputs if output.output_type == "error")
        trace = "\n".join(error.traceback)
        return Failure(last, trace.splitlines()[-1], f"{'-' * 75}\n{notebook.cells[last].source}\n{trace}")
    return None


def _progress(chapter: Chapter, notebook: NotebookNode, own: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Words for whoever waits: at the first cell, and then no more often than every few seconds."""
    numbers = {index: i for i, index in enumerate(
        (i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), start=1)}  # fmt: skip
    of_chapter = sum(index < own for index in numbers)
    start, last = time.monotonic(), -EVERY_S

    def started(index: int) -> None:
        nonlocal last
        now = time.monotonic() - start
        if index not in numbers or now - last < EVERY_S:
            return
        last = now
        if index < own:
            where = f"cell {numbers[index]}/{of_chapter}"
        else:
            where = f"trying checks and graders, {numbers[index] - of_chapter}/{len(numbers) - of_chapter}"
        say(f"{chapter.name}: {where}, {int(now) // 60}:{int(now) % 60:02d}")

    return started


def _clean(notebook: NotebookNode) -> None:
    """Leave what a reader sees, the same from run to run."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # clock times
        if cell.cell_type == "code":
            # A progress bar is for whoever waits; stored, it is a widget that no page can show.
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    notebook.metadata.pop("widgets", None)


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


def _explain(chapter: Chapter, notebook: NotebookNode, own: int, error: Failure) -> ChapterError:
    """Name chapter, cell and error."""
    cell = notebook.cells[error.index]
    if error.index < own:
        number = sum(cell.cell_type == "code" for cell in notebook.cells[: error.index + 1])
        return ChapterError(f"{source.describe(chapter, number, cell)}: {strip_ansi(error.summary)}", error.trace)
    for output in cell.outputs:
        if output.output_type == "error":  # its message names the cell on trial
            return ChapterError(output.evalue)
    return ChapterError(f"{chapter.slug}, while trying {cell.source[:120]}: {strip_ansi(error.summary)}")


def outlook(book: Book, chapters: tuple[Chapter, ...]) -> str:
    """What is to be executed, and how long that may take, in a sentence."""
    due = [chapter for chapter in chapters if not is_fresh(book, chapter)]
    if not due:
        return "Nothing to execute: no chapter, nor the code it stands on, has changed."
    minutes = sum(chapter.budget_s for chapter in due) / 60
    names = [chapter.slug if chapter.number is None else chapter.slug[:2] for chapter in due]
    return (
        f"To execute: {len(due)} of {len(chapters)} chapters ({', '.join(names)}). "
        f"Their budgets add up to {minutes:.0f} minutes of one quiet CPU core."
    )


if __name__ == "__main__":
    everything = manifest.read()
    print(outlook(everything, everything.chapters))
