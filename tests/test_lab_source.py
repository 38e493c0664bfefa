"""lab.source: what a chapter shows is what it imports."""

import inspect

import pytest
import torch

from kfqn_core.lab import checks, figures
from kfqn_core.lab.source import show_source


class Sample:
    @property
    def size(self):
        """A property, whose text has a fence: ```python."""
        return 1


def test_show_source_shows_the_imported_code_with_its_place():
    text = show_source(checks.relative_error).data
    source, start = inspect.getsourcelines(checks.relative_error)
    assert text.startswith(f"`kfqn_core/lab/checks.py`, lines {start}–{start + len(source) - 1}\n")
    assert "```python\n" + "".join(source) + "```" in text


def test_show_source_unwraps_decorators_and_dedents_methods():
    text = show_source(torch.no_grad()(figures.use_style)).data
    assert "def use_style() -> None:" in text
    assert "kfqn_core/lab/figures.py" in text
    text = show_source(Sample.size).data
    assert "\n@property\ndef size(self):\n    " in text
    assert text.count("````") == 2  # the fence outgrows the one in the docstring


def test_show_source_of_a_cell_names_no_file(monkeypatch):
    monkeypatch.setattr(checks.relative_error, "__module__", "__main__")  # as if a cell had defined it
    text = show_source(checks.relative_error).data
    assert text.startswith("From the first cell of this chapter:\n")
    assert "def relative_error(" in text


def test_show_source_of_a_module_starts_at_line_one():
    text = show_source(checks).data
    assert text.startswith("`kfqn_core/lab/checks.py`, lines 1–")
    assert '"""How far' in text


@pytest.mark.parametrize("obj", [len, torch.matmul, 3, Sample()])
def test_show_source_says_what_has_no_source(obj):
    with pytest.raises(TypeError, match="pass its class"):
        show_source(obj)
