"""Put something broken in the place of an object, found by its dotted name, before anything uses it."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any


def replace(target: str, code: str) -> None:
    """Replace `target` (`kfqn_core.room.function`, `kfqn_core.room.Class.method`) by the `broken` that `code` defines.

    The code sees the names of the target's module, and what it replaces as `original`. Modules that have imported a
    function by its name get the broken one, too.

    Raises:
        AttributeError: if there is no such object any more.
        TypeError: if it takes other parameters by now: a call that fails is another mistake than the one meant.
    """
    path, attribute = target.split("."), ""
    owner: Any = None
    for k in range(len(path) - 1, 0, -1):
        try:
            owner = module = importlib.import_module(".".join(path[:k]))
        except ModuleNotFoundError:
            continue
        for attribute in path[k:-1]:
            owner = getattr(owner, attribute)
        attribute = path[-1]
        break
    if owner is None or attribute not in vars(owner):
        raise AttributeError(f"{target} is gone: give this break another place, or drop it")
    original = vars(owner)[attribute]
    namespace = {**vars(module), "original": original}
    exec(code, namespace)
    taken, given = (_parameters(function) for function in (namespace["broken"], original))
    if taken != given:
        raise TypeError(f"{target} takes {given}, and its break {taken}: give the break the same parameters")
    setattr(owner, attribute, namespace["broken"])
    if owner is module:
        for name, user in list(sys.modules.items()):
            if name.startswith("kfqn_core") and vars(user).get(attribute) is original:
                setattr(user, attribute, namespace["broken"])


def _parameters(function: Any) -> list[str]:
    """The names of what a function takes, or that of a property, a class method or a static method."""
    plain = getattr(function, "fget", None) or getattr(function, "__func__", function)
    return list(inspect.signature(plain).parameters)
