"""What of a chapter a check needs: the statements before it that set, directly or through others, the names it reads.

A check that waits for three trained networks because the figure above it shows them is not asked a hundred times. What
a function does to its arguments is not seen here beyond `f(x)` and `x.f()` as statements; whoever runs a slice has to
see the check pass in it first.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


@dataclass
class Piece:
    """Some statements of a cell: the names they read, may set or set for certain, and what functions made here read."""

    cell: int
    place: int  # in the chapter, from 0
    source: str
    reads: set[str] = field(default_factory=set)
    sets: set[str] = field(default_factory=set)
    certain: set[str] = field(default_factory=set)
    later: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for statement in ast.parse(self.source).body:
            self._read(statement)

    def _read(self, statement: ast.stmt) -> None:
        order = _Order()
        order.visit(statement)
        loaded, stored = order.read_first, order.stored
        changed = set().union(*map(_changed, ast.walk(statement)))
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            stored, changed = {statement.name}, set()
            self.later[statement.name] = loaded
        elif isinstance(statement, ast.Assign) and any(isinstance(node, ast.Lambda) for node in ast.walk(statement)):
            self.later |= dict.fromkeys(stored, loaded)
        self.reads |= loaded - self.certain
        self.sets |= stored | changed
        if isinstance(statement, (*DEFINES, ast.Assign, ast.AnnAssign)):
            self.certain |= stored


class _Order(ast.NodeVisitor):
    """Walks a statement in the order in which Python does, once through every loop: which names it reads before it
    has set them itself."""

    def __init__(self) -> None:
        self.read_first, self.stored = set[str](), set[str]()
        self.inner = set[str]()  # names of a comprehension or a lambda: outside of it they are what they were

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.stored.add(node.id)
        elif node.id not in self.stored | self.inner:
            self.read_first.add(node.id)

    def visit_alias(self, node: ast.alias) -> None:
        self.stored.add(node.asname or node.name.split(".")[0])

    def visit_arg(self, node: ast.arg) -> None:
        self.stored.add(node.arg)

    def _in_order(self, node: ast.AST, *fields: str) -> None:
        for field_name in fields:
            value = getattr(node, field_name)
            for part in value if isinstance(value, list) else [value]:
                if part is not None:
                    self.visit(part)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._in_order(node, "value", "targets")

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.read_first |= _owner(node.target) - self.stored
        self._in_order(node, "value", "target")

    def visit_For(self, node: ast.For) -> None:
        self._in_order(node, "iter", "target", "body", "orelse")

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._in_order(node, "iter")
        self.inner |= {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        self._in_order(node, "ifs")

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        outer = set(self.inner)
        self._in_order(node, "generators", *(["key", "value"] if isinstance(node, ast.DictComp) else ["elt"]))
        self.inner = outer

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._in_order(node.args, "defaults", "kw_defaults")
        outer = set(self.inner)
        self.inner |= {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
        self._in_order(node, "body")
        self.inner = outer

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension  # noqa: N815


def _owner(node: ast.AST) -> set[str]:
    while isinstance(node, ast.Subscript | ast.Attribute | ast.Starred | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def _changed(node: ast.AST) -> set[str]:
    """The names of objects that a part of a statement changes: `x[0] = 1`, `x.append(1)`, `extend(x)`."""
    if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return _owner(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _owner(node.value.func) != {"print"}:
        own = _owner(node.value.func) if isinstance(node.value.func, ast.Attribute) else set()
        return own.union(*map(_owner, node.value.args))
    return set()


def pieces(cells: Iterable[tuple[int, str]], whole: Iterable[int]) -> list[Piece]:
    """The statements of a chapter, given its code cells by number; cells in `whole` stay in one piece."""
    found: list[Piece] = []
    for number, text in cells:
        text = TransformerManager().transform_cell(text)
        if number in whole:
            found.append(Piece(number, len(found), text))
            continue
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            # Lines keep their numbers, and columns are not cut: one line may hold two statements.
            own = "".join(lines[first - 1 : node.end_lineno]) if _alone(node, text) else ast.unparse(node)
            found.append(Piece(number, len(found), "\n" * (first - 1) + own))
    return found


def _alone(node: ast.stmt, text: str) -> bool:
    others = [
        other for other in ast.parse(text).body if other.lineno != node.lineno or other.col_offset != node.col_offset
    ]
    return all(other.end_lineno < node.lineno or other.lineno > node.end_lineno for other in others)


def needed(chapter: list[Piece], check: Piece) -> list[Piece]:
    """The pieces before `check` that it stands on, in their order."""
    late: dict[str, set[str]] = {}
    for piece in chapter:
        for name, names in piece.later.items():
            late[name] = late.get(name, set()) | names

    def lasting(names: Iterable[str]) -> set[str]:
        """What functions among `names` read when they are called, whenever that is."""
        found, waiting = set[str](), list(names)
        while waiting:
            more = late.get(waiting.pop(), set()) - found
            found |= more
            waiting += more
        return found

    wanted, always = set(check.reads), lasting(check.reads)
    chosen = []
    for piece in reversed(chapter[: check.place]):
        if piece.sets & (wanted | always):
            chosen.append(piece)
            wanted = (wanted - piece.certain) | piece.reads
            always |= lasting(piece.reads)
    return chosen[::-1]


def namespace(name: str = "chapter") -> dict[str, Any]:
    """The variables of a chapter that is about to run outside of a notebook; pictures and tables go nowhere."""
    import matplotlib

    matplotlib.use("Agg")
    module = sys.modules[name] = ModuleType(name)
    module.__dict__["display"] = lambda *shown, **options: None
    return module.__dict__


def run(piece: Piece, variables: dict[str, Any]) -> None:
    """Execute one piece; a function that it defines can show its source."""
    file = f"<{variables['__name__']}, cell {piece.cell}.{piece.place}>"
    linecache.cache[file] = (len(piece.source), None, piece.source.splitlines(True), file)
    exec(compile(piece.source, file, "exec"), variables)
