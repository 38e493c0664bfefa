"""The chapters as JupyterLab shows them: solutions and helper code closed, numbers and links of the site; saved as they
were.

`make lab` names this file as its settings. What is added for the view is taken away again when a chapter is saved.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import nbformat
from jupytext.sync_contentsmanager import TextFileContentsManager

from tools import manifest, source, view
from tools.manifest import Book, Chapter

VIEW = "view"  # metadata of the cells that are added
# Equations have their numbers from the book, in their TeX: JupyterLab would number all, also those without a label.
LINE = """---
numbering:
  equation: false
---

*Solutions are closed, and numbers and links are those of the site. What this view adds is not saved.*"""
WITHOUT = "*Solutions are closed. Numbers and links of the site are missing, because the book cannot be read: {error}*"
CLOSED = {"hide-input", "hide-cell"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def seen() -> tuple[Book | None, view.View | None, str]:
    """The book, with its numbers and places; or, while something of it cannot be read, why not."""
    try:
        book = manifest.read()
    except manifest.ManifestError as error:
        return None, None, str(error)
    files = [book.root / "book.toml", book.src / "references.bib", *(chapter.path for chapter in book.chapters)]
    try:
        return book, _view(book, tuple(path.stat().st_mtime_ns for path in files if path.exists())), ""
    except (source.ChapterError, OSError) as error:
        return book, None, str(error)


@lru_cache(maxsize=1)
def _view(book: Book, times: tuple[int, ...]) -> view.View:
    """Read once, until a file changes."""
    return view.of(book)


def opened(notebook: dict[str, Any], chapter: Chapter | None, book: view.View | None, why: str = "") -> None:
    """Close what the site closes, and add numbers, links, captions and a line that says so; in place."""
    cells = [_added(WITHOUT.format(error=why) if book is None else LINE)]
    for i, cell in enumerate(notebook["cells"]):
        metadata = cell["metadata"]
        cell["id"] = view.cell_id(i)
        cells.append(cell)
        if cell["cell_type"] == "markdown" and book is not None:
            cell["source"] = book.shown(chapter, cell["source"])
        solution = metadata.get("nbgrader", {}).get("solution")
        if cell["cell_type"] == "code" and (solution or CLOSED & set(metadata.get("tags", []))):
            metadata["jupyter"] = {"source_hidden": True}
        figure = metadata.get("mystnb", {}).get("figure")
        if figure and book is not None:
            cells.append(_added(book.caption(chapter, figure.get("name", ""), figure.get("caption", ""))))
    notebook["cells"][:] = cells


def _added(text: str) -> dict[str, Any]:
    return nbformat.v4.new_markdown_cell(text, metadata={VIEW: True, "editable": False, "deletable": False})


def saved(notebook: dict[str, Any]) -> None:
    """Take away what belongs to the view, and what Jupyter writes about its own kernel; in place."""
    notebook["cells"][:] = [cell for cell in notebook["cells"] if not cell["metadata"].get(VIEW)]
    for cell in notebook["cells"]:
        cell["metadata"].pop("jupyter", None)  # which cells happen to be closed
        if cell["cell_type"] == "markdown":
            cell["source"] = view.written(cell["source"])
    notebook["metadata"]["kernelspec"] = dict(KERNEL)


def _as_written(notebook: dict[str, Any], before: dict[str, Any]) -> None:
    """Metadata in the order in which they stood in the file `before`: some programs write them in the alphabet's."""
    orders = {json.dumps(cell["metadata"], sort_keys=True): cell["metadata"] for cell in before["cells"]}
    for cell in notebook["cells"]:
        cell["metadata"] = orders.get(json.dumps(cell["metadata"], sort_keys=True), cell["metadata"])


class Chapters(TextFileContentsManager):
    """Text notebooks, shown and saved so."""

    def get(self, path: str, content: bool = True, **more: Any) -> dict[str, Any]:
        model = super().get(path, content=content, **more)
        if content and model["type"] == "notebook" and path.endswith(".md"):
            book, shown, why = seen()
            slug = PurePosixPath(path).stem
            chapter = next((chapter for chapter in book.chapters if chapter.slug == slug), None) if book else None
            opened(model["content"], chapter, shown, why)
        return model

    def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        if model.get("type") == "notebook" and model.get("content") and path.endswith(".md"):
            saved(model["content"])
            if self.file_exists(path):
                _as_written(model["content"], super().get(path, type="notebook")["content"])
        return super().save(model, path)


if "get_config" in globals():  # read by Jupyter as its settings
    c = globals()["get_config"]()
    c.ServerApp.contents_manager_class = Chapters
