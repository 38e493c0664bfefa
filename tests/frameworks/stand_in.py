"""timm without torchvision: its models need none of it, but its transforms of images are imported along with them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types


class _Nothing(type):
    """A class whose attributes are their own names: enough for what stands at the head of a file."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        found = fullname.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if found else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def import_timm() -> types.ModuleType:
    """timm, with the torchvision there is or with a stand-in for it, which nobody else gets to see.

    Raises:
        ImportError: if timm itself is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
