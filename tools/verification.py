"""Does a check notice a wrong result, and a grader an empty, a lazy or a copied answer?

Imported by the kernel of a chapter after its last cell (`tools/notebooks.py` appends the calls). Every trial runs in
a shallow copy of the chapter's variables: it may rebind names, and a check or a grader changes nothing else.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Callable
from numbers import Number
from typing import Any

from IPython.utils.capture import capture_output

from tools import rooms

LAZY = (None, 0.0, 1.0, True, "", (), [], set(), {})
A_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class VerificationError(Exception):
    """A check that cannot fail, or a grader that accepts what is no answer."""


def _outcome(variables: dict[str, Any], source: str) -> Exception | None:
    """Run `source` in `variables` and return what it raised."""
    with capture_output():
        try:
            exec(source, variables)
        except Exception as error:
            return error
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _must_pass_again(variables: dict[str, Any], where: str, *sources: str) -> None:
    """A trial proves nothing if the unbroken original fails too, because a later cell changed what it reads."""
    fresh = dict(variables)
    for source in sources:
        error = _outcome(fresh, source)
        if error is not None:
            raise VerificationError(
                f"{where}: passes in its place, but not after the whole chapter ({_describe(error)}); "
                "a later cell changes a variable it reads"
            )


def check_must_fail(variables: dict[str, Any], where: str, source: str, broken_by: str, room: str) -> None:
    """Require that the check `source` enters its room, and fails with an AssertionError once `broken_by`, which puts
    something else in the room's place, has been executed."""
    with rooms.Visits(rooms.codes(room)) as visits:
        _must_pass_again(variables, where, source)
    if not visits.entered:
        raise VerificationError(
            f"{where}: the check never enters its room {room}, so that it says nothing about it: call it in this "
            "cell, or name the room that the cell does call"
        )
    broken = dict(variables)
    error = _outcome(broken, broken_by)
    if error is not None:
        raise VerificationError(f"{where}: broken_by itself fails ({_describe(error)}): {broken_by}")
    for name in rooms.names(room):
        if name in _bound(broken_by) and broken[name] is variables.get(name):
            raise VerificationError(f"{where}: broken_by binds {name} to what it was: {broken_by}")
    error = _outcome(broken, source)
    if error is None:
        raise VerificationError(f"{where}: the check still passes after its broken_by, so it cannot fail: {broken_by}")
    if not isinstance(error, AssertionError):
        raise VerificationError(
            f"{where}: after its broken_by the check stops with {_describe(error)} instead of failing its assert: "
            f"{broken_by}"
        )


def _bound(source: str) -> set[str]:
    """The variables that `source` sets."""
    steps = dis.get_instructions(compile(source, "cell", "exec"))
    return {step.argval for step in steps if step.opname == "STORE_NAME"}


def stub_must_fail(variables: dict[str, Any], where: str, solution: str, stub: str, grader: str) -> None:
    """Require that the grader rejects what a student starts from."""
    _must_pass_again(variables, where, solution, grader)
    empty = dict(variables)
    for name in _stored(solution):  # the answer itself must not survive from the run with the solution
        empty.pop(name, None)
    _outcome(empty, stub)  # nbgrader too goes on after a cell that stops
    if _outcome(empty, grader) is None:
        raise VerificationError(f"{where}: the grader accepts the stub without any answer")


def lazy_must_fail(variables: dict[str, Any], where: str, solution: str, shown: str, grader: str) -> None:
    """Require that the grader rejects each answer replaced by what is none: a constant, an empty container, its own
    first argument or, where the arguments are numbers, a table of what the grader as `shown` to students asks for; and
    that no message of it prints the right answer."""
    _must_pass_again(variables, where, solution, grader)
    for name in sorted(_stored(solution) & set(re.findall(r"\w+", grader))):
        right = variables[name]
        if not callable(right):
            for wrong in (None, type(right)()):
                _must_reject(variables | {name: wrong}, where, f"{name} = {wrong!r}", grader)
            continue
        for wrong in LAZY:
            stand_in = _StandIn(right, lambda *args, wrong=wrong, **kwargs: wrong)
            error = _must_reject(variables | {name: stand_in}, where, f"a {name} that returns {wrong!r}", grader)
            _must_keep_quiet(where, error, stand_in)
        first = _StandIn(right, lambda *args, **kwargs: args[0] if args else next(iter(kwargs.values()), None))
        _must_reject(variables | {name: first}, where, f"a {name} that returns its first argument", grader)
        table = _StandIn(right, right)
        _outcome(variables | {name: table}, shown)
        if table.calls and all(_is_plain(args, kwargs) for args, kwargs in table.calls):
            known = {_key(args, kwargs): right(*args, **kwargs) for args, kwargs in table.calls}
            copied = _StandIn(right, lambda *args, known=known, **kwargs: known.get(_key(args, kwargs), 0.5))
            what = f"a table in place of {name}, of the cases that students see; hide some more of them"
            _must_reject(variables | {name: copied}, where, what, grader)


class _StandIn:
    """A function in place of an answer; it remembers how it was called."""

    def __init__(self, right: Callable[..., Any], wrong: Callable[..., Any]) -> None:
        self.right, self.wrong, self.calls = right, wrong, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.wrong(*args, **kwargs)


def _must_reject(variables: dict[str, Any], where: str, answer: str, grader: str) -> Exception:
    error = _outcome(dict(variables), grader)
    if error is None:
        raise VerificationError(f"{where}: the grader accepts {answer}")
    return error


def _must_keep_quiet(where: str, error: Exception, stand_in: _StandIn) -> None:
    """No number of the message may be what the answer should have been."""
    if not isinstance(error, AssertionError) or not stand_in.calls:
        return
    args, kwargs = stand_in.calls[-1]
    truth = set(_numbers(stand_in.right(*args, **kwargs)))
    harmless = set(_numbers([args, list(kwargs.values())])) | {0.0, 1.0}
    for text in A_NUMBER.findall(str(error)):
        said = float(text)
        if said not in harmless and any(abs(said - value) <= 1e-3 * abs(value) for value in truth - harmless):
            raise VerificationError(f"{where}: the grader's message tells the answer, {text}: {error}")


def _numbers(value: Any) -> list[float]:
    """The numbers in a value; a tensor counts as none."""
    if isinstance(value, Number):
        return [float(value)]
    if isinstance(value, (list, tuple, set)):
        return [number for part in value for number in _numbers(part)]
    return []


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args or kwargs) and all(isinstance(value, Number) for value in [*args, *kwargs.values()])


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (*args, *sorted(kwargs.items()))


def _stored(code: str) -> set[str]:
    """Names that a cell binds."""
    steps = dis.get_instructions(compile(code, "cell", "exec"))
    return {step.argval for step in steps if step.opname == "STORE_NAME"}
