"""What a piece of a chapter needs of the chapter, and nothing more."""

import pytest

from tools import prelude

CHAPTER = """import math
import torch
from kfqn_core.lab import figures, checks
a, b = 1, 2
b += 1
def helper(x):
    return other(x) + a
def other(x):
    return math.sqrt(x)
model = [1]
model.append(b)
figures.use_style()
for i in range(3):
    torch.manual_seed(i)
    figures.draw(i)
torch.manual_seed(0)
unused = torch.ones(3)
with torch.no_grad():
    kept = torch.zeros(2)
a = 5
class Seen:
    limit = b
    def read(self):
        return late
late = 7"""


def sliced(*names):
    return [statement.source.splitlines()[0] for statement in prelude.needed(prelude.statements(CHAPTER), set(names))]


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("b", ["a, b = 1, 2", "b += 1"]),
        ("a", ["a = 5"]),
        ("model", ["a, b = 1, 2", "b += 1", "model = [1]", "model.append(b)"]),
        ("helper", ["import math", "a, b = 1, 2", "def helper(x):", "def other(x):", "a = 5"]),
        ("kept", ["import torch", "torch.manual_seed(0)", "with torch.no_grad():"]),
        ("checks", ["from kfqn_core.lab import checks"]),
        ("Seen", ["a, b = 1, 2", "b += 1", "class Seen:", "late = 7"]),
        ("nothing of it", []),
    ],
)
def test_the_slice(name, lines):
    assert sliced(name) == lines


def test_free_names_are_what_is_read_and_not_bound_before():
    code = (
        "x = y + 1\nprint(x)\ndef f(n):\n    return f(n - 1) + z\nfor i in range(k):\n    i += x\nw = [v for v in u]\n"
    )
    assert prelude.free_names(code) == {"y", "z", "k", "u"}
    assert prelude.bound_names(code) == {"x", "f", "i", "w"}


def test_a_name_that_is_read_before_it_is_bound_is_free():
    assert prelude.free_names("x = x + 1") == {"x"}


def test_statements_after_a_semicolon_and_with_decorators():
    found = [statement.source for statement in prelude.statements("a = 1; b = a\n@mark\ndef f():\n    pass\n")]
    assert found == ["a = 1", "b = a", "@mark\ndef f():\n    pass"]
