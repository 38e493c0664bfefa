"""The ledger: which claim of the book is verified by which check, implemented in which room, guarded by which test."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from tools import scores, source
from tools.manifest import Book, Chapter
from tools.rooms import PACKAGE, codes, find_room, unnamed

CLAIMS = ("prf:theorem", "prf:lemma", "prf:proposition", "prf:corollary")
KEYS = ("verifies", "room", "test", "broken_by")
FORBIDDEN_TAGS = ("skip-execution", "raises-exception")


@dataclass(frozen=True)
class Claim:
    chapter: Chapter
    label: str
    title: str


@dataclass(frozen=True)
class Check:
    chapter: Chapter
    number: int
    cell_id: str
    where: str  # names the cell in messages
    verifies: tuple[str, ...]
    room: str
    test: str
    broken_by: str
    source: str


@dataclass(frozen=True)
class Ledger:
    claims: tuple[Claim, ...]
    checks: tuple[Check, ...]
    problems: tuple[str, ...]


def checks(chapter: Chapter, notebook: NotebookNode) -> tuple[list[Check], list[str]]:
    """The check cells of one chapter, and what is wrong with the way they are written."""
    found, problems = [], []
    for number, cell in source.code_cells(notebook):
        given = {key: cell.metadata[key] for key in KEYS if key in cell.metadata}
        if not given:
            continue
        where = source.describe(chapter, number, cell)
        verifies = given.get("verifies")
        if isinstance(verifies, str):
            given["verifies"] = verifies = [verifies]
        missing = [key for key in KEYS if not given.get(key)]
        texts = [*verifies, *(given[key] for key in KEYS[1:])] if not missing and isinstance(verifies, list) else [None]
        if missing:
            problems.append(f"{where}: no {', '.join(missing)}")
        elif not all(isinstance(text, str) for text in texts):
            problems.append(f"{where}: verifies is a label or a list of labels; room, test and broken_by are strings")
        else:
            given["verifies"] = tuple(verifies)
            found.append(Check(chapter, number, cell.id, where, source=cell.source, **given))
            problems += [f"{where}: {problem}" for problem in _cell_problems(cell, given["broken_by"])]
    return found, problems


def _cell_problems(cell: NotebookNode, broken_by: str) -> list[str]:
    try:
        tree, breaking = ast.parse(cell.source), ast.parse(broken_by)
    except SyntaxError as error:
        return [f"not plain Python: {error.msg} in {error.text!r}"]
    nodes = list(ast.walk(tree))
    problems = [f"is tagged {tag}" for tag in FORBIDDEN_TAGS if tag in cell.metadata.get("tags", [])]
    if not any(isinstance(node, ast.Assert) for node in nodes):
        problems.append("no assert")
    if any(isinstance(node, (ast.Try, ast.TryStar)) for node in nodes):
        problems.append("a try statement could hide the failure")
    rebound = {node.id for node in ast.walk(breaking) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    rebound |= {node.name for node in breaking.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    if not rebound & read:
        problems.append(f"broken_by rebinds no name that the cell reads: {broken_by}")
    return problems


@cache
def _definitions(path: Path) -> dict[str, ast.AST]:
    """Functions of a test file and methods of its classes, by the name pytest gives them."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}": inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def find_test(root: Path, test: str) -> ast.AST:
    """The definition of the test `path::function`; LookupError if there is none."""
    file, _, name = test.partition("::")
    if not (root / file).is_file():
        raise LookupError(f"test {test}: no file {file}")
    if not name.split("::")[-1].startswith("test") or name not in _definitions(root / file):
        raise LookupError(f"test {test}: {file} has no {name or 'function named after ::'}")
    return _definitions(root / file)[name]


def collect(book: Book) -> Ledger:
    """Read the claims and checks of the whole book."""
    claims: list[Claim] = []
    all_checks: list[Check] = []
    problems: list[str] = []
    for chapter in book.chapters:
        notebook = source.read(book, chapter)
        found, wrong = checks(chapter, notebook)
        all_checks += found
        problems += wrong
        for directive in source.directives(notebook):
            if directive.name in CLAIMS and directive.label:
                if directive.label in {claim.label for claim in claims}:
                    problems.append(f"{chapter.slug}: duplicate claim {directive.label}")
                claims.append(Claim(chapter, directive.label, directive.title))

    labels = {claim.label for claim in claims}
    for check in all_checks:
        for label in check.verifies:
            if label not in labels:
                problems.append(f"{check.where}: verifies {label}, which is no claim")
        for find, *arguments in ((codes, check.room), (find_test, book.root, check.test)):
            try:
                find(*arguments)
            except LookupError as error:
                problems.append(f"{check.where}: {error}")
            else:
                if find is codes and (missing := unnamed(check.room, check.broken_by)):
                    problems.append(f"{check.where}: {missing}")
    verified = {label for check in all_checks for label in check.verifies}
    problems += [f"{c.chapter.slug}: claim {c.label} has no check" for c in claims if c.label not in verified]
    return Ledger(tuple(claims), tuple(all_checks), tuple(problems))


def page(root: Path, ledger: Ledger) -> str:
    """The ledger as a page of the site: the table, then the source of every room and test in it."""
    rooms = {check.room: find_room(check.room) for check in ledger.checks}
    tests = {check.test: find_test(root, check.test) for check in ledger.checks}
    # A claim may stand in several chapters' checks; one row for each pair.
    rows = [
        [
            f"{{prf:ref}}`{claim.label}`: {claim.title}",
            f"{{ref}}`chapter {claim.chapter.number}, cell {check.number} <{anchor(check)}>`",
            f"{{ref}}`{check.room} <room-{check.room}>`",
            f"{{ref}}`{check.test.partition('::')[2]} <{_test_anchor(check.test)}>`",
        ]
        for claim in ledger.claims
        for check in ledger.checks
        if claim.label in check.verifies
    ]
    table = [":::{list-table}", ":class: ledger", ":header-rows: 1", ":widths: 32 14 24 30", ""]
    for row in [["Claim", "Check", "Room", "Test"], *rows]:
        table += [f"{'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    sections = ["## The rooms", *(_room_source(root, name, room) for name, room in sorted(rooms.items()))]
    sections += ["## The tests", *(_test_source(root, name, node) for name, node in sorted(tests.items()))]
    score = scores.section(dict.fromkeys(claim.chapter.slug for claim in ledger.claims))
    return "\n\n".join(part for part in [PAGE_HEAD, "\n".join([*table, ":::"]), score, *sections] if part) + "\n"


PAGE_HEAD = f"""# Ledger

Every numbered claim of the book has a *check*, a cell that enters the claim's room, compares it with an exact
reference, and has been seen to fail once the room was broken; a *room*, the part of `{PACKAGE}` that implements it; and
a *test* that guards the room. This page is made from the chapters, and the book does not build while one of the three
is missing."""


def anchor(check: Check) -> str:
    """The target that the site sets before a check cell."""
    return f"check-{check.chapter.slug}-{check.number}"


def _test_anchor(test: str) -> str:
    return "test-" + test.replace("::", "-")


def _room_source(root: Path, name: str, room: Any) -> str:
    module = inspect.getmodule(room) or inspect.getmodule(find_room(name.rpartition(".")[0]))
    file = Path(module.__file__)
    try:
        lines, first = inspect.getsourcelines(room)
    except TypeError:  # a value, such as a preset: its module shows it
        lines, first = inspect.getsourcelines(module)
    return _listing(f"room-{name}", name, file.relative_to(root), max(first, 1), "".join(lines))


def _test_source(root: Path, name: str, node: ast.AST) -> str:
    file, _, function = name.partition("::")
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = (root / file).read_text(encoding="utf-8").splitlines()[first - 1 : node.end_lineno]
    return _listing(_test_anchor(name), function, Path(file), first, "\n".join(lines))


def _listing(target: str, title: str, file: Path, first: int, text: str) -> str:
    code = f"```{{code-block}} python\n:lineno-start: {first}\n\n{text.rstrip()}\n```"
    return f"({target})=\n\n:::{{admonition}} `{title}` in {file.as_posix()}\n:class: dropdown\n\n{code}\n:::"
