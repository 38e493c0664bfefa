"""Mutants: copies of a function with one small mistake in each, put in its place in memory.

Libraries for this (mutmut, cosmic-ray) write every mutant to the disk and start a test runner for it, which imports
torch again each time and knows nothing of chapters. Here the code object of the living function is exchanged: whoever
holds the function, under whatever name, runs the mutant, and thousands take minutes.

What is at a room's door (conditions that only raise, `_check...` and `_require...`), messages, annotations and default
values are left alone.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

from tools import rooms

DOOR = re.compile(r"_?(check|require)(_|$)")
PAIRS = [
    *[(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.Gt), (ast.LtE, ast.GtE), (ast.Eq, ast.NotEq)],
    *[(ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr)],
]
OTHER = {**dict(PAIRS), **{b: a for a, b in PAIRS}, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult}
METHODS = [
    *[("sum", "mean"), ("amin", "amax"), ("min", "max"), ("minimum", "maximum"), ("any", "all"), ("triu", "tril")],
    *[("add_", "sub_"), ("mul_", "div_")],
]
OTHER_METHOD = {**dict(METHODS), **{b: a for a, b in METHODS}, "square": "abs"}
DROPPED_METHOD = (
    "abs",
    "sqrt",
    "clone",
    "transpose",
    "flip",
    "clamp",
    "clamp_min",
    "neg",
    "conj",
    "square",
    "reciprocal",
    "rsqrt",
)


@dataclass(frozen=True)
class Mutant:
    room: str
    function: str  # qualified name below its module
    module: str
    node: int  # the place in the tree of the function, in the order of `ast.walk`
    variant: int
    line: int  # from the `def` on
    before: str
    after: str

    @property
    def name(self) -> str:
        return f"{self.function}:{self.node}:{self.variant}"


@cache
def syntax_tree(name: str) -> ast.Module:
    """The syntax tree of a module, as it was when it was first asked for."""
    return ast.parse(Path(sys.modules[name].__file__ or "").read_text(encoding="utf-8"))


def _definition(tree: ast.AST, qualified: str) -> ast.FunctionDef:
    for name in qualified.split("."):
        tree = next(
            n for n in ast.iter_child_nodes(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name
        )
    assert isinstance(tree, ast.FunctionDef)
    return tree


def parts(room: str) -> dict[tuple[str, str], Any]:
    """The functions of a room and the private ones of their modules that they call, by module and qualified name."""
    found: dict[tuple[str, str], Any] = {}
    waiting = list(rooms.functions(room).items())
    while waiting:
        name, function = waiting.pop(0)
        if (function.__module__, name) in found or "<locals>" in name or DOOR.match(name):
            continue
        found[function.__module__, name] = function
        for node in ast.walk(_definition(syntax_tree(function.__module__), name)):
            helper = (
                function.__globals__.get(node.id) if isinstance(node, ast.Name) and node.id.startswith("_") else None
            )
            plain = inspect.unwrap(helper) if callable(helper) else None
            if inspect.isfunction(plain) and plain.__module__ == function.__module__:
                waiting.append((plain.__qualname__, plain))
    return found


def text(module: str, function: str) -> str:
    """The function as far as it is code: the same for another comment or docstring."""
    node = copy.deepcopy(_definition(syntax_tree(module), function))
    if ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(node)


def mutants(room: str, most: int, seed: int = 0) -> list[Mutant]:
    """At most `most` mutants of a room, drawn by a seeded generator from all there are, in the order of the source."""
    found = [
        mutant
        for (module, function) in parts(room)
        for mutant in _of(room, module, function)
        if _compiled(mutant) is not None
    ]
    random.Random(f"{room} {seed}").shuffle(found)
    return sorted(found[:most], key=lambda mutant: (mutant.function, mutant.node, mutant.variant))


def _of(room: str, module: str, function: str) -> Iterator[Mutant]:
    definition = _definition(syntax_tree(module), function)
    closed = set(_closed(definition))
    for place, node in enumerate(ast.walk(definition)):
        for variant, changed in enumerate(() if node in closed else _variants(node)):
            line = node.lineno - definition.lineno
            yield Mutant(room, function, module, place, variant, line, ast.unparse(node), ast.unparse(changed))


def _closed(definition: ast.FunctionDef) -> Iterator[ast.AST]:
    """What is no part of the idea: the door, words, types."""
    yield from ast.walk(definition.args)
    for decorator in definition.decorator_list:
        yield from ast.walk(decorator)
    for node in ast.walk(definition):
        door = isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.ExceptHandler)
        door |= isinstance(node, ast.If) and all(isinstance(step, ast.Raise) for step in node.body) and not node.orelse
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = getattr(node.value.func, "attr", getattr(node.value.func, "id", ""))
            door |= bool(DOOR.match(name)) or name == "warn"
        if door:
            yield from ast.walk(node)
        # `strict` of zip is a door as well.
        strict = node.value if isinstance(node, ast.keyword) and node.arg == "strict" else None
        for other in (getattr(node, "annotation", None), getattr(node, "returns", None), strict):
            if other is not None:
                yield from ast.walk(other)


def _with(node: ast.AST, **fields: Any) -> Any:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _variants(node: ast.AST) -> Iterator[ast.AST]:
    """The node with a mistake in it, one at a time."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in OTHER:
        yield _with(node, op=OTHER[type(node.op)]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield _with(node, left=node.right, right=node.left)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OTHER:
        yield _with(node, ops=[OTHER[type(node.ops[0])]()])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
        yield node.operand
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield _with(node, value=not node.value)
        elif isinstance(node.value, int | float):
            yield _with(node, value=node.value + 1 if isinstance(node.value, int) else 2 * node.value or 1.0)
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.attr in ("T", "mT", "mH"):
        yield node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        name = node.func.attr
        if name in OTHER_METHOD:
            yield _with(node, func=_with(node.func, attr=OTHER_METHOD[name]))
        if name in DROPPED_METHOD and not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            yield node.func.value
        if name == "where" and len(node.args) == 3:
            yield _with(node, args=[node.args[0], node.args[2], node.args[1]])
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id not in dir(builtins)
        and len(node.args) > 1
    ):
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
        yield _with(node, value=_with(node.value, elts=node.value.elts[::-1]))
    if isinstance(node, ast.If | ast.IfExp):
        yield _with(node, test=ast.UnaryOp(op=ast.Not(), operand=node.test))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass(lineno=node.lineno)
    if isinstance(node, ast.AugAssign):
        yield ast.Pass(lineno=node.lineno)
    if isinstance(node, ast.Assign) and all(
        isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets
    ):
        yield ast.Pass(lineno=node.lineno)


class _Put(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def _compiled(mutant: Mutant) -> CodeType | None:
    """The mutant's code; None where it is not Python, or does not close over the same variables."""
    tree = copy.deepcopy(syntax_tree(mutant.module))
    definition = _definition(tree, mutant.function)
    node = list(ast.walk(definition))[mutant.node]
    tree = ast.fix_missing_locations(_Put(node, list(_variants(node))[mutant.variant]).visit(tree))
    try:
        top = compile(tree, sys.modules[mutant.module].__file__ or "", "exec")
    except (SyntaxError, ValueError):
        return None
    waiting = [top]
    while waiting:
        code = waiting.pop()
        if code.co_qualname == mutant.function:
            same = code.co_freevars == living(mutant).__code__.co_freevars
            return code if same else None
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return None


def living(mutant: Mutant) -> Any:
    """The living function of a mutant."""
    found: Any = sys.modules[mutant.module]
    for name in mutant.function.split("."):
        found = inspect.getattr_static(found, name)
    found = getattr(found, "fget", None) or getattr(found, "func", None) or getattr(found, "__func__", found)
    return inspect.unwrap(found)


def put(mutant: Mutant) -> None:
    """Let everybody who holds the function run the mutant, from now on in this process."""
    code = _compiled(mutant)
    if code is None:
        raise ValueError(f"{mutant.name} cannot be compiled: it was made from another source")
    living(mutant).__code__ = code
