"""What the closed boxes of a page are called: by what is in them, so that no two of a page are alike."""

from __future__ import annotations

import ast
import re

from nbformat import NotebookNode

from tools.manifest import Chapter

HIDDEN = {"hide-input", "hide-cell", "hide-output"}
FIGURE = re.compile(r"^(?::{3,}|`{3,})\{figure\}", re.MULTILINE)


def name(chapter: Chapter, notebook: NotebookNode, graders: dict[str, str]) -> None:
    """Name the toggle of every hidden cell, in place; `graders` are the titles of exercises by the grader's id.

    What a grader prints is hidden with it: it was printed for the solution, and no reader has answered yet.
    """
    figures, cells, used = 0, 0, set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            figures += len(FIGURE.findall(cell.source))
        if cell.cell_type != "code":
            continue
        cells += 1
        is_figure = "figure" in cell.metadata.get("mystnb", {})
        figures += is_figure
        grader = graders.get(cell.metadata.get("nbgrader", {}).get("grade_id"))
        tags = cell.metadata.get("tags", [])
        if grader:
            cell.metadata["tags"] = [tag for tag in tags if tag not in HIDDEN] + ["hide-cell"]
            what = f"Grader: {grader.replace('$', '')}"
        elif not HIDDEN & set(tags):
            continue
        elif is_figure and chapter.number is not None:
            what = f"code of Fig. {chapter.number}.{figures}"
        else:
            what = f"code: {_made(cell.source) or f'cell {cells}'}"
        what = what if what not in used else f"{what} (cell {cells})"
        used.add(what)
        settings = cell.metadata.setdefault("mystnb", {})
        settings["code_prompt_show"] = what if grader else f"Show the {what}"
        settings["code_prompt_hide"] = what if grader else f"Hide the {what}"


def _made(code: str) -> str:
    """The functions and classes that a cell defines or shows, else the first names that it sets."""
    try:
        body = ast.parse(code).body
    except SyntaxError:  # a magic of notebooks
        return ""
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if shown := re.search(r"^show_source\(([\w.]+)", code, re.MULTILINE):
        names.append(shown[1])
    if not names:
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
