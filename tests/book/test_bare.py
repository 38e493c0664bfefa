"""Unit tests of the optimizer run with pytest and torch alone, as on a user's own machine."""

import pytest

from tests.book import tiny
from tools.manifest import ROOT

# Python runs this at its start: what only `make setup` installs cannot be imported.
WITHOUT = """
import sys

class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing)
"""
BOOK_AND_LAB = {
    *("hypothesis", "yaml", "importlinter", "grimp", "nbmake", "nbformat", "nbclient", "nbconvert"),
    *("jupytext", "nbgrader", "sphinx", "docutils", "IPython", "ipykernel", "traitlets", "xdist", "pytest_timeout"),
    *("sklearn", "scipy", "pandas", "matplotlib", "cycler", "tqdm", "pytorch_optimizer", "opt_einsum"),
}


@pytest.fixture
def bare(tmp_path):
    """Run pytest with nothing but itself and torch."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(WITHOUT.format(names=BOOK_AND_LAB))

    def run(root, *arguments):
        return tiny.run(root, "pytest", "-p", "no:cacheprovider", *arguments,
                        PYTHONPATH=str(tmp_path / "hidden"), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # fmt: skip

    return run


def test_the_tests_of_this_book_are_collected(bare):
    report = bare(ROOT, "-q", "-rs", "--collect-only", "tests")
    assert report.returncode == 0, report.stdout[-3000:] + report.stderr
    assert "tests/test_layers.py::" in report.stdout
    assert "tests/book/test_site.py::" not in report.stdout
    assert "test_site.py needs nbformat, which is not installed here: `make setup` installs it" in report.stdout


def test_what_can_run_does_and_the_rest_says_why_not(bare, tmp_path):
    root = tiny.install_tools(tiny.write(tmp_path / "book", ("01-one", "One", "")))
    (root / "tests" / "test_more.py").write_text("from hypothesis import given\n\n\ndef test_more():\n    pass\n")
    (root / "lab.py").write_text("import pandas as pd\n")
    (root / "tests" / "test_lab.py").write_text("import lab\n\n\ndef test_lab():\n    pass\n")
    report = bare(root, "-q", "-rs", "tests")
    assert report.returncode == 0, report.stdout + report.stderr
    assert "1 passed, 2 skipped" in report.stdout
    assert "test_more.py needs hypothesis, which is not installed here" in report.stdout
    assert "test_lab.py needs pandas, which is not installed here" in report.stdout


@pytest.mark.parametrize("line", ["import hypothesi", "import kfqn_core.maths.nothing", "from hypothesis import gven"])
def test_a_mistake_is_not_skipped(tmp_path, line):
    root = tiny.install_tools(tiny.write(tmp_path, ("01-one", "One", "")))
    (root / "tests" / "test_more.py").write_text(f"{line}\n\n\ndef test_more():\n    pass\n")
    report = tiny.run(root, "pytest", "-q", "tests")
    assert report.returncode == 2, report.stdout
    assert "ERROR tests/test_more.py" in report.stdout
