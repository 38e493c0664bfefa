"""The contract that `make lint` holds: nothing in kfqn_core imports upward."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.manifest import ROOT

FLOORS = ("maths", "layers", "parallel", "truth", "estimate", "training", "lab")


def lint_imports(root):
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture
def lint(tmp_path):
    """Run import-linter with this book's contract on a house of one room a floor, with further files."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run(**files):
        for name in FLOORS:
            files.setdefault(f"{name}/__init__", "")
        files.setdefault("__init__", "import kfqn_core.training\n")
        for name, text in files.items():
            path = tmp_path / "kfqn_core" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return lint_imports(tmp_path)

    return run


def test_the_floors_as_drawn(lint):
    """Every import that goes down, at once."""
    below = {
        "truth/__init__": ("maths", "layers", "parallel"),
        "estimate/__init__": ("maths", "layers", "parallel"),
        "training/__init__": ("maths", "layers", "parallel", "truth", "estimate"),
        "lab/__init__": ("maths", "layers", "parallel", "truth", "estimate", "training"),
    }
    files = {name: "".join(f"import kfqn_core.{floor}\n" for floor in floors) for name, floors in below.items()}
    report = lint(**files)
    assert report.returncode == 0, report.stdout
    assert "Contracts: 1 kept, 0 broken." in report.stdout


@pytest.mark.parametrize(
    ("floor", "line"),
    [
        ("maths", "from kfqn_core.layers import view"),
        ("layers", "import kfqn_core.maths"),
        ("parallel", "from kfqn_core import maths"),
        ("truth", "def late():\n    import kfqn_core.estimate"),
        ("estimate", "from kfqn_core.truth import exact"),
        ("estimate", "from kfqn_core.training import groups"),
        ("training", "import kfqn_core.lab"),
        ("maths", "import kfqn_core"),  # its front door stands above everything
    ],
)
def test_an_import_that_goes_up_or_aside_is_found(lint, floor, line):
    report = lint(**{f"{floor}/room": f"{line}\n"})
    assert report.returncode == 1, report.stdout
    assert "Contracts: 0 kept, 1 broken." in report.stdout
    assert f"kfqn_core.{floor}.room" in report.stdout


def test_a_new_folder_needs_a_floor(lint):
    report = lint(**{"attic/__init__": ""})
    assert report.returncode == 1, report.stdout
    assert "kfqn_core.attic" in report.stdout


def test_the_house_keeps_it():
    report = lint_imports(ROOT)
    assert report.returncode == 0, report.stdout + report.stderr
