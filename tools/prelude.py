"""What a piece of a chapter needs of the chapter: a backward slice over its statements.

A statement is kept if it binds a name that is needed, or changes the object behind one in place; then what it reads is
needed too. Functions read their globals when they are called, at the end, so the slice is repeated until no new name
appears. The slice is held by a test that runs every exercise with nothing else before it.
"""

from __future__ import annotations

import ast
import builtins
import symtable
from dataclasses import dataclass, replace

BUILTINS = frozenset(dir(builtins)) | {"__name__", "__file__", "__doc__", "get_ipython", "display"}


@dataclass(frozen=True)
class Statement:
    """One statement at the top of a cell."""

    source: str
    binds: frozenset[str]
    reads_now: frozenset[str]
    reads_later: frozenset[str]  # by the functions in it, once they are called
    changes: frozenset[str]  # names whose objects it changes in place

    @property
    def node(self) -> ast.stmt:
        return ast.parse(self.source).body[0]

    @property
    def reads(self) -> frozenset[str]:
        return self.reads_now | self.reads_later

    @property
    def imports(self) -> bool:
        return isinstance(self.node, (ast.Import, ast.ImportFrom))

    @property
    def defines(self) -> bool:
        return self.imports or isinstance(self.node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))

    @property
    def is_compound(self) -> bool:
        return isinstance(self.node, (ast.For, ast.While, ast.If, ast.With, ast.Try))

    @property
    def is_block(self) -> bool:
        """Does it need room around it?"""
        return self.is_compound or (self.defines and not self.imports)

    def narrowed(self, wanted: set[str]) -> Statement:
        """The import with those names alone that are `wanted`."""
        node = self.node
        node.names = [alias for alias in node.names if (alias.asname or alias.name).partition(".")[0] in wanted]
        return replace(self, source=ast.unparse(node), binds=self.binds & frozenset(wanted))


def statements(code: str) -> list[Statement]:
    """The statements of a cell of plain Python; comments that stand alone are left out."""
    found = []
    nodes = ast.parse(code).body
    for node in nodes:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        text = "\n".join(code.splitlines()[first - 1 : node.end_lineno])
        if any(other is not node and other.lineno == node.end_lineno for other in nodes) or node.col_offset:
            text = ast.get_source_segment(code, node) or ""  # statements between semicolons
        binds, now = _own(table := symtable.symtable(text, "cell", "exec"))
        found.append(
            Statement(
                source=text,
                binds=frozenset(binds),
                reads_now=frozenset(now - BUILTINS),
                reads_later=frozenset(_of_inner(table) - BUILTINS),
                changes=frozenset(_changed(node)),
            )
        )
    return found


def free_names(code: str) -> set[str]:
    """Names that `code` reads and does not bind before."""
    bound: set[str] = set()
    free: set[str] = set()
    parts = statements(code)
    for part in parts:
        # A loop, a `with` or a walrus may read what the same statement binds; a plain assignment may not.
        own = part.binds if part.is_compound or part.defines else frozenset()
        free |= part.reads_now - bound - own
        bound |= part.binds
    return free | {name for part in parts for name in part.reads_later - bound}


def bound_names(code: str) -> set[str]:
    """Names that `code` binds."""
    return {name for part in statements(code) for name in part.binds}


def needed(before: list[Statement], names: set[str]) -> list[Statement]:
    """Those of the statements `before` without which `names` are not what they are after all of them."""
    later: set[str] = set()
    modules = {name for statement in before if statement.imports for name in statement.binds}
    while True:
        wanted = set(names) | later
        kept: list[Statement] = []
        for statement in reversed(before):
            # `torch.manual_seed(1)` changes torch; a loop that draws a picture does not.
            changes = statement.changes - modules if statement.is_compound else statement.changes
            if not (statement.binds | changes) & wanted:
                continue
            kept.append(statement.narrowed(wanted) if statement.imports else statement)
            if not _keeps_old_value(statement):
                wanted -= statement.binds
            wanted |= statement.reads
        grown = later | {name for statement in kept for name in statement.reads_later}
        if grown == later:
            return kept[::-1]
        later = grown


def _keeps_old_value(statement: Statement) -> bool:
    """May a name that the statement binds keep the value from before?"""
    return not isinstance(
        statement.node,
        (ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.With),
    )


def _own(table: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    symbols = table.get_symbols()
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    binds |= {symbol.get_name() for symbol in symbols if symbol.is_namespace()}
    reads = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    for child in table.get_children():  # a class body and a comprehension run at once, a method later
        if child.get_type() == "class" or child.get_name() in ("listcomp", "setcomp", "dictcomp", "genexpr"):
            reads |= _globals(child) if child.get_type() != "class" else _globals_here(child)
    return binds, reads


def _of_inner(table: symtable.SymbolTable) -> set[str]:
    return {name for child in table.get_children() for name in _globals(child)}


def _globals(table: symtable.SymbolTable) -> set[str]:
    return _globals_here(table) | _of_inner(table)


def _globals_here(table: symtable.SymbolTable) -> set[str]:
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}


def _changed(node: ast.stmt) -> set[str]:
    """Names at the root of what is assigned to by attribute or index, or of a method called for its effect."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return set()
    found = set()
    for inner in ast.walk(node):
        target: ast.expr | None = None
        if isinstance(inner, (ast.Attribute, ast.Subscript)) and isinstance(inner.ctx, ast.Store):
            target = inner
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call):
            target = inner.value.func if isinstance(inner.value.func, ast.Attribute) else None
        while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
            target = target.func if isinstance(target, ast.Call) else target.value
        if isinstance(target, ast.Name):
            found.add(target.id)
    return found
