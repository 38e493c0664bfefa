"""The chapters as JupyterLab shows them: solutions and helper code closed, one line about numbers; saved as they were.

`make lab` names this file as its settings. What is added for the view is taken away again when a chapter is saved.
"""

from __future__ import annotations

from typing import Any

import nbformat
from jupytext.sync_contentsmanager import TextFileContentsManager

VIEW = "view"  # metadata of the cell that is added
LINE = (
    "*In JupyterLab theorems, equations and exercises are counted anew in each chapter, and references to figures, to "
    "other chapters and to the literature stay as they are written. The site has the numbers of the whole book: "
    "`make book`.*"
)
CLOSED = {"hide-input", "hide-cell"}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def opened(notebook: dict[str, Any]) -> None:
    """Close what the site closes, and add the line; in place."""
    for cell in notebook["cells"]:
        metadata = cell["metadata"]
        solution = metadata.get("nbgrader", {}).get("solution")
        if cell["cell_type"] == "code" and (solution or CLOSED & set(metadata.get("tags", []))):
            metadata["jupyter"] = {"source_hidden": True}
    line = nbformat.v4.new_markdown_cell(LINE, metadata={VIEW: True, "editable": False, "deletable": False})
    notebook["cells"].insert(0, line)


def saved(notebook: dict[str, Any]) -> None:
    """Take away what belongs to the view, and what Jupyter writes about its own kernel; in place."""
    notebook["cells"][:] = [cell for cell in notebook["cells"] if not cell["metadata"].get(VIEW)]
    for cell in notebook["cells"]:
        cell["metadata"].pop("jupyter", None)  # which cells happen to be closed
    notebook["metadata"]["kernelspec"] = dict(KERNEL)


class Chapters(TextFileContentsManager):
    """Text notebooks, shown and saved so."""

    def get(self, path: str, content: bool = True, **more: Any) -> dict[str, Any]:
        model = super().get(path, content=content, **more)
        if content and model["type"] == "notebook" and path.endswith(".md"):
            opened(model["content"])
        return model

    def save(self, model: dict[str, Any], path: str = "") -> dict[str, Any]:
        if model.get("type") == "notebook" and model.get("content") and path.endswith(".md"):
            saved(model["content"])
        return super().save(model, path)


if "get_config" in globals():  # read by Jupyter as its settings
    c = globals()["get_config"]()
    c.ServerApp.contents_manager_class = Chapters
