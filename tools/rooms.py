"""Rooms: the parts of the package that claims name. What a room is made of, and whether a run enters it.

Imported by the kernel of a chapter as well (`tools/verification.py`): nothing but the standard library.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FrameType, ModuleType
from typing import Any

PACKAGE = "kfqn_core"
BESIDE = "benchmarks"  # the comparison of chapter 13: not installed, but its protocol makes claims as well


def find_room(room: str) -> Any:
    """The object that `room` names, below the package or, where it begins with `benchmarks`, beside it; LookupError if
    there is none."""
    full = room if room.split(".")[0] == BESIDE else f"{PACKAGE}.{room}"
    top, *names = full.split(".")
    for found in _objects(_module(top, full), top, names, full):
        return found
    raise LookupError(f"room {full} does not exist")


def _objects(found: Any, path: str, names: list[str], full: str) -> Iterator[Any]:
    """Whatever `names` may mean below `found`. What a package shows under a name comes first: of `layers.view` that is
    the function. A file of the same name comes second, and holds `layers.view.LayerView`."""
    if found is None:
        return
    if not names:
        yield found
        return
    path, name, *names = f"{path}.{names[0]}", *names
    yield from _objects(getattr(found, name, None), path, names, full)
    if inspect.ismodule(found):
        yield from _objects(_module(path, full), path, names, full)


def _module(path: str, full: str) -> ModuleType | None:
    try:
        return importlib.import_module(path)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == path:
            return None
        raise LookupError(f"room {full}: {path} cannot be imported: {error}") from None


def functions(room: str) -> dict[str, Any]:
    """The functions that a room is made of, by their qualified names: itself, or all that stand in its class or module.

    Raises:
        LookupError: if there is no such room, or if it is a value, which nobody can enter.
    """
    found = dict(_functions(find_room(room)))
    if not found:
        raise LookupError(f"room {room} has no code to enter: name a function, a class or a module")
    return found


def _functions(room: Any, home: str | None = None) -> Iterator[tuple[str, Any]]:
    if isinstance(room, property):
        room = room.fget
    elif isinstance(room, (staticmethod, classmethod)):
        room = room.__func__
    elif isinstance(room, functools.cached_property):
        room = room.func
    if inspect.isclass(room) or inspect.ismodule(room):
        home = room.__name__ if inspect.ismodule(room) else room.__module__
        file = sys.modules[home].__file__
        for member in vars(room).values():
            if inspect.isclass(member) and (member.__module__ != home or member is room):
                continue
            for name, function in () if inspect.ismodule(member) else _functions(member, home):
                # A data class has methods that stand in no file.
                if function.__code__.co_filename == file:
                    yield name, function
    elif callable(room):
        plain = inspect.unwrap(room)
        if inspect.isfunction(plain) and home in (None, plain.__module__):
            yield plain.__qualname__, plain


def codes(room: str) -> frozenset[CodeType]:
    """What Python executes when the room is entered; LookupError as for `functions`."""
    return frozenset(function.__code__ for function in functions(room).values())


class Visits:
    """While this context is open, `entered` collects which of `watched` code objects are called."""

    def __init__(self, watched: frozenset[CodeType]) -> None:
        self.watched, self.entered = watched, set[CodeType]()

    def __enter__(self) -> Visits:
        self._before = sys.getprofile()
        sys.setprofile(self._notice)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._before)

    def _notice(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code in self.watched:
            self.entered.add(frame.f_code)


def names(room: str) -> tuple[str, ...]:
    """By what code can speak of the room: its last name and, of a method, that of its class."""
    above, _, last = room.rpartition(".")
    return (last, above.rpartition(".")[2]) if above and inspect.isclass(find_room(above)) else (last,)


def unnamed(room: str, code: str) -> str | None:
    """What is wrong if `code`, which is meant to break the room, does not even speak of it."""
    spoken: set[str] = set()
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return "broken_by is not plain Python"
    for node in ast.walk(tree):
        spoken |= {getattr(node, key) for key in ("id", "attr", "name") if isinstance(getattr(node, key, None), str)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            spoken |= set(node.value.split("."))
    if spoken & set(names(room)):
        return None
    return (
        f"broken_by leaves the room as it is: it should put something else in the place of {' or '.join(names(room))}, "
        f"or patch it, and says: {code}"
    )
