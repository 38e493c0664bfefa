"""The real source of a function or class, shown in a chapter. Code is never retyped in the text."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from IPython.display import Markdown

__all__ = ["show_source"]


def show_source(obj: Any) -> Markdown:
    """The source of a function, method, property, class or module, with its file and line numbers.

    Returns Markdown with a fenced Python block, which JupyterLab and the site both highlight. The file is given
    relative to the folder that holds its package, e.g. `kfqn_core/maths/algebra.py`. What the chapter itself defines,
    in a cell that is closed on the page, is shown without a place.

    Raises `TypeError` for what has no Python source (a builtin, an instance, a number).
    """
    target: Any = obj.fget if isinstance(obj, property) else inspect.unwrap(obj) if callable(obj) else obj
    try:
        lines, start = inspect.getsourcelines(target)
        file = inspect.getsourcefile(target)
    except (TypeError, OSError):
        lines, start, file = [], 0, None
    if not lines or file is None:
        raise TypeError(
            f"show_source: no Python source for {obj!r}; expected a function, method, property, class or module "
            "written in Python (builtins and compiled functions have none; for an object, pass its class)"
        )
    source = textwrap.dedent("".join(lines)).rstrip()
    # A fence one backtick longer than any in the source, so that a docstring cannot end the block.
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", source))]))
    first = max(start, 1)  # inspect counts the lines of a module from 0
    place = f"`{_path_in_package(target, Path(file))}`, lines {first}–{first + len(lines) - 1}"
    if getattr(target, "__module__", None) == "__main__":
        # A cell: its file is the kernel's, and has another name each time.
        place = "From the first cell of this chapter:"
    return Markdown(f"{place}\n\n{fence}python\n{source}\n{fence}\n")


def _path_in_package(target: Any, file: Path) -> str:
    """The file as its package names it: a chapter must not show where the reader's copy happens to live."""
    module = inspect.getmodule(target)
    package = sys.modules[module.__name__.partition(".")[0]] if module else None
    if package is None or not hasattr(package, "__path__"):
        return file.name
    return file.relative_to(Path(package.__path__[0]).parent).as_posix()
