"""A claim without a check, and a check that could not fail, are found in the text before anything runs."""

import sys

import pytest

from tests.book import tiny
from tools import ledger, manifest, rooms


def collect(root, text):
    return ledger.collect(manifest.load(tiny.write(root, ("01-one", "One", text))))


def test_the_real_book_has_no_gaps():
    found = ledger.collect(manifest.load())
    assert found.problems == ()
    assert found.claims


def test_a_sound_chapter(tmp_path):
    found = collect(tmp_path, tiny.CLAIM)
    assert found.problems == ()
    (claim,), (check,) = found.claims, found.checks
    assert (claim.label, claim.title) == ("thm-sum", "Sums")
    assert (check.verifies, check.number, check.room) == (("thm-sum",), 2, "maths.algebra.kron_matvec")


def test_one_check_may_verify_several_claims(tmp_path):
    second = ":::{prf:lemma} Another\n:label: lem-other\n$1$\n:::\n"
    assert "claim lem-other has no check" in collect(tmp_path, tiny.CLAIM + second).problems[0]
    both = tiny.CLAIM.replace("verifies: thm-sum", "verifies: [thm-sum, lem-other]") + second
    assert collect(tmp_path, both).problems == ()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two floors. `layers` shows a function `view`, which hides the file of that name."""
    name = "package_with_rooms"
    files = {
        "__init__": "",
        "layers/__init__": f"from {name}.layers.view import LayerView\nfrom {name}.layers.kinds import view\n",
        "layers/view": "class LayerView:\n    def patches(self):\n        pass\n",
        "layers/kinds": "def view(layer):\n    pass\n\nSUPPORTED = (int, float)\n",
        "maths/__init__": "",
        "maths/algebra": "def vec(W):\n    pass\n",
        "maths/broken": "import a_module_that_is_not_there\n",
    }
    for file, text in files.items():
        path = tmp_path / name / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(rooms, "PACKAGE", name)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize(
    ("room", "kind", "where"),
    [
        ("layers.view", "function", "layers.kinds"),
        ("layers.view.LayerView", "type", "layers.view"),
        ("layers.LayerView", "type", "layers.view"),
        ("layers.view.LayerView.patches", "function", "layers.view"),
        ("maths.algebra.vec", "function", "maths.algebra"),
    ],
)
def test_a_room_in_a_package(package, room, kind, where):
    found = rooms.find_room(room)
    assert (type(found).__name__, found.__module__) == (kind, f"{package}.{where}")


def test_a_module_and_a_floor_are_rooms(package):
    assert rooms.find_room("maths.algebra").__name__ == f"{package}.maths.algebra"
    assert rooms.find_room("maths").__name__ == f"{package}.maths"
    assert rooms.find_room("layers.kinds.SUPPORTED") == (int, float)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ("layers.view.Nothing", "room .*layers.view.Nothing does not exist"),
        ("layers.view.view", "room .*layers.view.view does not exist"),
        ("attic.vec", "room .*attic.vec does not exist"),
        ("maths.broken.vec", "maths.broken cannot be imported: No module named 'a_module_that_is_not_there'"),
    ],
)
def test_no_such_room(package, room, message):
    with pytest.raises(LookupError, match=message):
        rooms.find_room(room)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("verifies: thm-sum", "verifies: thm-product", "verifies thm-product, which is no claim"),
        ("verifies: thm-sum", "verifies: thm-product", "claim thm-sum has no check"),
        ("verifies: thm-sum\n", "", "no verifies"),
        ("verifies: thm-sum", "verifies: 3", "verifies is a label or a list of labels"),
        ("room: maths.algebra.kron_matvec\n", "", "no room"),
        ("maths.algebra.kron_matvec", "maths.algebra.nothing", "room kfqn_core.maths.algebra.nothing does not exist"),
        ("maths.algebra.kron_matvec", "nowhere.kron_matvec", "room kfqn_core.nowhere.kron_matvec does not exist"),
        ("test: tests/test_algebra.py::test_sum\n", "", "no test"),
        ("test_algebra.py", "test_nothing.py", "no file tests/test_nothing.py"),
        ("::test_sum", "::test_product", "tests/test_algebra.py has no test_product"),
        ("::test_sum", "", "has no function named after ::"),
        ('broken_by: "kron_matvec = lambda A, G, V: A - V"\n', "", "no broken_by"),
        ("kron_matvec = lambda", "subtract = lambda", "broken_by rebinds no name that the cell reads"),
        ("kron_matvec = lambda A, G, V: A - V", "kron_matvec.off = 1", "broken_by rebinds no name that the cell reads"),
        ("kron_matvec = lambda A, G, V: A - V", "kron_matvec = (", "not plain Python"),
        ("kron_matvec = lambda A, G, V: A - V", "number = str", "broken_by leaves the room as it is"),
        ("maths.algebra.kron_matvec", "training.presets.KBFGS_2020", "has no code to enter"),
        ("assert error < 1e-12", "error < 1e-12", "no assert"),
        ("assert error < 1e-12", "try:\n    assert error < 1\nexcept AssertionError:\n    pass", "a try statement"),
        ("verifies: thm-sum", "tags: [skip-execution]\nverifies: thm-sum", "is tagged skip-execution"),
        ("verifies: thm-sum", "tags: [raises-exception]\nverifies: thm-sum", "is tagged raises-exception"),
    ],
)
def test_problems(tmp_path, old, new, problem):
    assert old in tiny.CLAIM
    found = collect(tmp_path, tiny.CLAIM.replace(old, new))
    assert any(problem in text and text.startswith("01-one") for text in found.problems), found.problems


def test_duplicate_claim(tmp_path):
    assert "duplicate claim thm-sum" in collect(tmp_path, tiny.CLAIM + tiny.CLAIM).problems[0]


def test_a_decorated_test_method_is_found(tmp_path):
    tiny.write(tmp_path)
    file = tmp_path / "tests" / "test_more.py"
    file.write_text("class TestSum:\n    @staticmethod\n    def test_it():\n        pass\n")
    assert ledger.find_test(tmp_path, "tests/test_more.py::TestSum::test_it").lineno == 3
    with pytest.raises(LookupError):
        ledger.find_test(tmp_path, "tests/test_more.py::TestSum::helper")
