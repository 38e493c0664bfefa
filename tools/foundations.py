"""What lies below the repository: the packages and modules that the outputs of a chapter depend on.

`installed` is one line for every distribution of this Python. What has no distribution (a module on PYTHONPATH, a
package that is developed beside the book) has no version to trust: `loose_files` finds its files.
"""

from __future__ import annotations

import ast
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

COMPILED = (".so", ".pyd", ".dll", ".dylib")


@cache
def installed() -> tuple[str, ...]:
    """Python and every installed distribution with its version, in one order on every machine."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
        found.setdefault(name, distribution.version)  # the first on the path is the one that is imported
    python = f"{platform.python_implementation()}=={platform.python_version()}"
    return (python, *(f"{name}=={version}" for name, version in sorted(found.items())))


@cache
def imports(code: str) -> frozenset[str]:
    """The top-level modules that `code` imports, wherever in it; magics of a notebook are understood."""
    try:
        tree = ast.parse(TransformerManager().transform_cell(code))
    except SyntaxError:
        return frozenset()  # it will stop with that error when it runs
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return frozenset(names)


def loose_files(names: Iterable[str], known: Iterable[str] = ()) -> list[Path]:
    """The files of the modules `names` and of what those import, as far as no distribution's version stands for them;
    `known` modules are somebody else's business."""
    seen, waiting, files = {"__main__", *known, *sys.stdlib_module_names}, set(names), []
    while waiting - seen:
        name = min(waiting - seen)
        seen.add(name)
        for file in _loose(name):
            files.append(file)
            if file.suffix == ".py":
                waiting |= imports(file.read_text(encoding="utf-8", errors="replace"))
    return files


@cache
def _distributed() -> frozenset[str]:
    return frozenset(metadata.packages_distributions())


def _loose(name: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module that was made by hand has no spec
        return []
    if spec is None:
        return []
    places = [Path(place) for place in spec.submodule_search_locations or [spec.origin] if place]
    at_home = all({"site-packages", "dist-packages"} & set(place.parts) for place in places)
    if at_home and name in _distributed():
        return []
    return sorted(file for place in places for file in _files(place))


def _files(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from (file for file in place.rglob("*") if file.suffix in (".py", *COMPILED))
    elif place.is_file():  # a built-in module has none
        yield place
