"""A chapter's text, as the notebook it is."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jupytext
import yaml
from jupytext.myst import MystMetadataParsingError
from nbformat import NotebookNode

from tools.manifest import Book, Chapter

DIRECTIVE = re.compile(
    r"^(?P<fence>:{3,}|`{3,})\{(?P<name>[\w:-]+)\}[ \t]*(?P<title>.*)\n(?P<options>(?::[\w-]+:.*(?:\n|\Z))*)",
    re.MULTILINE,
)
LABEL = re.compile(r"^:label:\s*(\S+)", re.MULTILINE)


class ChapterError(Exception):
    """A chapter that cannot be read or run: where, and why."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True)
class Directive:
    name: str
    title: str
    label: str | None


def read(book: Book, chapter: Chapter) -> NotebookNode:
    """The chapter as a notebook without outputs, the same one for the same text."""
    try:
        notebook = jupytext.read(chapter.path, fmt="md:myst")
    except (yaml.YAMLError, MystMetadataParsingError) as error:
        raise ChapterError(f"{chapter.slug}: header or cell metadata is not YAML: {error}") from None
    notebook.metadata = NotebookNode(
        kernelspec={"name": book.kernel, "display_name": "Python 3", "language": "python"},
        language_info={"name": "python"},
    )
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # jupytext draws them at random
    return notebook


def code_cells(notebook: NotebookNode) -> list[tuple[int, NotebookNode]]:
    """The code cells with the number that Jupyter shows as `[n]` after a run from top to bottom."""
    return list(enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1))


def describe(chapter: Chapter, number: int, cell: NotebookNode) -> str:
    """How messages name a cell: chapter, number, first line."""
    first_line = next((line for line in cell.source.splitlines() if line.strip()), "")
    return f"{chapter.slug}, code cell {number} ({first_line.strip()[:80]})"


def directives(notebook: NotebookNode) -> list[Directive]:
    """The directives of the prose, in order."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for match in DIRECTIVE.finditer(cell.source):
                label = LABEL.search(match["options"])
                found.append(Directive(match["name"], match["title"].strip(), label[1] if label else None))
    return found
