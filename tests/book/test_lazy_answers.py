"""A grader that accepts no answer, or tells the right one, is found out."""

import pytest

from tools.verification import VerificationError, lazy_must_fail

SOLUTION = "def twice(x):\n    return 2 * x\n"


def judge(grader, shown=None, solution=SOLUTION):
    variables = {}
    exec(solution, variables)
    lazy_must_fail(variables, "there", solution, shown or grader, grader)


@pytest.mark.parametrize(
    ("grader", "shown", "message"),
    [
        ("twice(3)", None, "accepts a twice that returns None"),
        ("assert twice(3) is not None", None, r"accepts a twice that returns 0\.0"),
        ("assert twice(0.5) == 1", None, r"accepts a twice that returns 1\.0"),
        ("assert twice(0) == 0", None, r"accepts a twice that returns 0\.0"),
        ("assert twice([1]) in ([1, 1], [1])", None, "returns its first argument"),
        ("for x in (3, 5):\n    assert twice(x) == 2 * x", None, "accepts a table in place of twice"),
        ("x = 3\nassert twice(x) == 2 * x, f'it is {2 * x}'", "pass", "message tells the answer, 6: it is 6"),
    ],
)
def test_it_is_found_out(grader, shown, message):
    with pytest.raises(VerificationError, match=message):
        judge(grader, shown)


def test_hidden_cases_are_what_a_table_does_not_know():
    judge("for x in (3, 5, 8):\n    assert twice(x) == 2 * x, f'not for {x}'", "for x in (3, 5):\n    twice(x)")


def test_a_container_must_be_filled():
    solution = "answer = {'a': 1, 'b': 2}\n"
    judge("assert answer and answer['a'] == 1", solution=solution)
    with pytest.raises(VerificationError, match=r"accepts answer = \{\}"):
        judge("for key in answer:\n    assert answer[key] > 0", solution=solution)
