"""Pages of chapters that have no results here: their text and code are shown, and a word at the top says why.

A reader who has executed one chapter can read the whole book, and every reference still leads somewhere.
"""

from __future__ import annotations

import nbformat
from nbformat import NotebookNode

from tools import notebooks, source
from tools.manifest import Book, Chapter

# Where a picture would be: without one the figure has no number, and nothing could refer to it.
BLANK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 80" role="img"><rect x="1" y="1" width="638" height="78" '
    'fill="none" stroke="gray" stroke-dasharray="6 4"/><text x="320" y="45" text-anchor="middle" fill="gray" '
    'font-family="sans-serif" font-size="16">Drawn when this chapter is executed</text></svg>'
)


def page(book: Book, chapter: Chapter) -> NotebookNode:
    """The chapter as far as it came here: up to the cell that failed, or without results."""
    failed = notebooks.failure(book, chapter) is not None
    notebook = nbformat.read(notebooks.running(book, chapter), 4) if failed else source.read(book, chapter)
    for _, cell in source.code_cells(notebook):
        pictures = (kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/"))
        if "figure" in cell.metadata.get("mystnb", {}) and not any(pictures):
            # A figure is one picture: what else a cell that failed has printed stands in the note.
            cell.outputs = [nbformat.v4.new_output("display_data", {"image/svg+xml": BLANK})]
    return notebook


def note(book: Book, chapter: Chapter) -> str:
    """The box at the top of such a page."""
    failed = notebooks.failure(book, chapter)
    if failed is not None:
        lines = [line for line in failed.splitlines() if line.strip()]
        what = (
            f"**This chapter failed on this machine**, and shows no results from there on:\n\n```text\n{lines[-1]}\n```"
        )
        return f":::{{warning}}\n{what}\n:::\n\n"
    if chapter.device == "gpu":
        return ":::{note}\nThis chapter needs a GPU and was built without one: its cells have no output.\n:::\n\n"
    again = "`make book`" if chapter.number is None else f"`make chapter N={chapter.number:02d}` or `make book`"
    return f":::{{note}}\nThis chapter was not executed here, so that its code has no results: {again}.\n:::\n\n"


def among(book: Book, chapter: Chapter) -> str:
    """For the one page that was executed: which others were not."""
    others = [other for other in book.chapters if other != chapter and not notebooks.is_fresh(book, other)]
    if not others:
        return ""
    names = ", ".join(f"{{doc}}`{other.number or other.title} <{other.slug}>`" for other in others)
    return (
        ":::{note}\nThis page was made alone. These were not executed here, and show their code without results: "
        f"{names}. `make book` makes them all.\n:::\n\n"
    )
