"""Mutants are small mistakes in living code; a chapter runs as far as its checks need it; verdicts become a table."""

import importlib
import json
import sys

import pytest

from tools import mutants, mutation, scores, slices

SUMS = '''"""Words."""
from functools import wraps


def plain(function):
    @wraps(function)
    def wrapper(*given):
        return function(*given)

    return wrapper


@plain
def add(a, b=1):
    """a + b; not a - b."""
    if a is None:
        raise ValueError(f"{a + 1} is no number")
    _check_number(a)
    return _sum(a, b)


def _sum(a, b):
    total = a + b
    return total


def _check_number(a):
    return a > 0


class Scale:
    def __init__(self, k):
        self.k = k

    @property
    def twice(self):
        return 2 * self.k

    def times(self, x):
        return super().__repr__() and self.k * x
'''


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A package with one file; returns how to name what is in it."""
    name = "package_of_sums"
    for file, text in (("__init__", ""), ("sums", SUMS)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{file}.py").write_text(text)
    monkeypatch.setattr("tools.rooms.PACKAGE", name)
    monkeypatch.syspath_prepend(tmp_path)
    mutation.syntax_tree.cache_clear()
    yield importlib.import_module(f"{name}.sums")
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
    mutation.syntax_tree.cache_clear()


def changes(found):
    return {(mutant.function, mutant.before, mutant.after) for mutant in found}


def test_a_function_and_the_helpers_it_calls_have_mutants_and_its_door_has_none(room):
    found = changes(mutation.mutants("sums.add", 100))
    assert found == {("_sum", "a + b", "a - b"), ("add", "_sum(a, b)", "_sum(b, a)")}


def test_methods_and_properties_have_mutants(room):
    found = changes(mutation.mutants("sums.Scale", 100))
    assert ("Scale.twice", "2 * self.k", "2 / self.k") in found
    assert ("Scale.twice", "2", "3") in found
    assert ("Scale.times", "self.k * x", "self.k / x") in found
    assert ("Scale.__init__", "self.k = k", "pass") in found


def test_whoever_holds_the_function_runs_the_mutant(room):
    held, inner, scale = room.add, vars(room)["_sum"], room.Scale(5)
    (mutant,) = [m for m in mutation.mutants("sums.add", 100) if m.after == "a - b"]
    assert held(5, 3) == 8
    mutation.put(mutant)
    assert held(5, 3) == inner(5, 3) == 2
    (mutant,) = [m for m in mutation.mutants("sums.Scale", 100) if m.after == "self.k / x"]
    mutation.put(mutant)
    assert scale.times(2) == 2.5


def test_a_sample_is_drawn_by_its_seed(room):
    some = mutation.mutants("sums.Scale", 3)
    assert some == mutation.mutants("sums.Scale", 3)
    assert len({mutation.mutants("sums.Scale", 3, seed=seed)[0] for seed in range(8)}) > 1


def test_a_fork_says_what_it_found_and_nothing_if_it_dies():
    assert mutants.forked(lambda: [1, "two"], 10) == [1, "two"]
    assert mutants.forked(lambda: sys.exit(3), 10) is None
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        mutants.forked(lambda: 1 / 0, 10)

    def endless():
        while True:
            pass

    assert mutants.forked(endless, 0.5) is None


CHAPTER = [
    (1, "import math\nfrom os import path as where\nslow = 1 / 0"),
    (2, "def area(r):\n    return pi * r**2\n\n\npi = 3\nradii = [1]; radii.append(2)\nradii.extend([3])"),
    (3, "for r in radii:\n    print(r, slow)\nx = [area(r) for r in radii]\nx[0] = 0"),
    (4, "error = sum(x) - sum(x)\nassert error == 0"),
]


def needed(check):
    pieces = slices.pieces(CHAPTER, whole={4})
    (last,) = [piece for piece in pieces if piece.cell == 4]
    return slices.needed(pieces, last if check is None else slices.Piece(9, len(pieces), check))


def test_a_check_needs_what_its_names_come_from():
    texts = [piece.source.strip() for piece in needed(None)]
    assert texts == [
        "def area(r):\n    return pi * r**2", "pi = 3", "radii = [1]", "radii.append(2)", "radii.extend([3])",
        "x = [area(r) for r in radii]", "x[0] = 0",
    ]  # fmt: skip
    variables = slices.namespace("a_chapter")
    for piece in needed(None):
        slices.run(piece, variables)
    assert variables["x"] == [0, 12, 27]


@pytest.mark.parametrize(
    ("check", "first"),
    [
        ("x = [radii for radii in ()]\nassert radii", "radii = [1]"),
        ("f = lambda radii: 1\nassert radii", "radii = [1]"),
        ("total = 0\nfor slow in [1]:\n    total += slow\nassert total", None),
        ("assert [slow for slow in (1, 2)]", None),
        ("assert slow", "slow = 1 / 0"),
        ("slow += 1", "slow = 1 / 0"),
        ("assert math.pi", "import math"),
        ("assert where.sep", "from os import path as where"),
        ("f = lambda: pi\nassert f() == 3", "pi = 3"),
    ],
)
def test_what_a_check_reads_before_it_sets_it(check, first):
    texts = [piece.source.strip() for piece in needed(check)]
    assert texts[:1] == ([] if first is None else [first])


def verdict(where, mutant, caught, room="maths.sums.add"):
    return {
        "where": where, "room": room, "mutant": mutant, "code": "0", "line": 3, "before": "a + b", "after": "a - b",
        "verdict": "caught" if caught else "survived", "by": "", "s": 0.1,
    }  # fmt: skip


@pytest.fixture
def records(tmp_path, monkeypatch):
    lines = [
        *[verdict("tests", f"add:{i}:0", i < 3) for i in range(4)],
        *[verdict("01-one", f"add:{i}:0", i < 1) for i in range(4)],
        verdict("tests", "f:0:0", True, room="maths.sums.f"),
        verdict("02-two", "f:0:0", True, room="maths.sums.f"),
    ]
    file = tmp_path / "mutants.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    equivalent = tmp_path / "equivalent.toml"
    equivalent.write_text(
        '[[equivalent]]\nmutant = "add:3:0"\nbefore = "a + b"\nafter = "a - b"\nreason = "b is zero."\n'
    )
    monkeypatch.setattr(scores, "RECORDS", file)
    monkeypatch.setattr(scores, "EQUIVALENT", equivalent)
    return scores.read(file)


def test_the_score_of_a_chapter(records):
    assert scores.score(records, "01-one") == scores.Score(rooms=1, mutants=3, by_tests=3, by_checks=1)
    assert scores.score(records, "02-two") == scores.Score(rooms=1, mutants=1, by_tests=1, by_checks=1)


def test_the_ledger_shows_scores_survivors_and_equivalent_mutants(records, monkeypatch):
    monkeypatch.setattr(scores, "read", lambda: records)
    page = scores.section(["01-one", "02-two", "03-three"])
    assert "* - {doc}`01-one`\n  - 1\n  - 3\n  - 3 (100%)\n  - 1 (33%)" in page
    assert "checks let pass: 2" in page
    assert "b is zero." in page
    assert "03-three" not in page
    assert scores.section(["03-three"]) == ""


def test_committed_verdicts_name_rooms_that_exist_and_reasons_name_mutants():
    found = scores.read()
    assert found, "make mutants writes tools/mutants.jsonl"
    for room in {record["room"] for record in found}:
        assert mutation.parts(room)
    used = {(record["mutant"], record["before"], record["after"]) for record in found if record["equivalent"]}
    assert len(used) == scores.EQUIVALENT.read_text(encoding="utf-8").count("[[equivalent]]")
