"""Does a check notice a wrong result, and a grader an empty answer?

Imported by the kernel of a chapter after its last cell (`tools/notebooks.py` appends the calls). Every trial runs in
a shallow copy of the chapter's variables: it may rebind names, and a check or a grader changes nothing else.
"""

from __future__ import annotations

import dis
from typing import Any

from IPython.utils.capture import capture_output


class VerificationError(Exception):
    """A check that cannot fail, or a grader that accepts the stub."""


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


def check_must_fail(variables: dict[str, Any], where: str, source: str, broken_by: str) -> None:
    """Require that the check `source` fails with an AssertionError once `broken_by` has been executed."""
    _must_pass_again(variables, where, source)
    broken = dict(variables)
    error = _outcome(broken, broken_by)
    if error is not None:
        raise VerificationError(f"{where}: broken_by itself fails ({_describe(error)}): {broken_by}")
    error = _outcome(broken, source)
    if error is None:
        raise VerificationError(f"{where}: the check still passes after its broken_by, so it cannot fail: {broken_by}")
    if not isinstance(error, AssertionError):
        raise VerificationError(
            f"{where}: after its broken_by the check stops with {_describe(error)} instead of failing its assert: "
            f"{broken_by}"
        )


def stub_must_fail(variables: dict[str, Any], where: str, solution: str, stub: str, grader: str) -> None:
    """Require that the grader rejects what a student starts from."""
    _must_pass_again(variables, where, solution, grader)
    empty = dict(variables)
    for step in dis.get_instructions(compile(solution, where, "exec")):
        if step.opname == "STORE_NAME":  # the answer itself must not survive from the run with the solution
            empty.pop(step.argval, None)
    _outcome(empty, stub)  # nbgrader too goes on after a cell that stops
    if _outcome(empty, grader) is None:
        raise VerificationError(f"{where}: the grader accepts the stub without any answer")
