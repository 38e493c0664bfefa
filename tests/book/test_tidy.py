"""Toggles are named by what is in them; what the extensions write is put right for screen readers."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools import manifest, tidy, toggles

CHAPTER = manifest.read().find("02")


def named(*cells, graders=None):
    notebook = new_notebook(cells=list(cells))
    toggles.name(CHAPTER, notebook, graders or {})
    return [cell.metadata.get("mystnb", {}).get("code_prompt_show") for cell in cells if cell.cell_type == "code"]


def hidden(code, **more):
    return new_code_cell(code, metadata={"tags": ["hide-input"], **more})


def test_toggles_are_named_by_what_is_in_them():
    figure = {"mystnb": {"figure": {"name": "fig-a"}}}
    assert named(
        hidden("def f():\n    pass\n\nclass G:\n    pass"),
        new_code_cell("shown = 1"),
        new_markdown_cell(":::{figure} _static/a.svg\n:::"),
        hidden("plot()", **figure),
        hidden("a = b = 1"),
        hidden("a = 2"),
        hidden("show_source(G.f)"),
        hidden("%timeit f()"),
        hidden("def f():\n    pass\n\nclass G:\n    pass"),
    ) == [
        "Show the code: f, G",
        None,
        "Show the code of Fig. 2.2",
        "Show the code: a, b",
        "Show the code: a",
        "Show the code: G.f",
        "Show the code: cell 7",
        "Show the code: f, G (cell 8)",
    ]


def test_a_grader_is_called_so_and_hides_what_it_printed():
    grader = hidden("assert True", nbgrader={"grade_id": "ex-a-check"})
    assert named(grader, graders={"ex-a-check": "The trace of $A$"}) == ["Grader: The trace of A"]
    assert grader.metadata["tags"] == ["hide-cell"]


@pytest.mark.parametrize(
    ("there", "belongs"),
    [
        ('<summary aria-label="Toggle hidden content">\n<p>Show</p>', "<summary>\n<p>Show</p>"),
        ('<section class="lemma-content" id="proof-content">', '<section class="lemma-content">'),
        ('<div class="proof admonition" id="proof">', '<div class="proof admonition">'),
        ('<section id="exercise-content">', "<section>"),
        ('<div role="list" class="citation-list">', '<div class="citation-list">'),
        ("<tr><th></th><th>a</th></tr>", "<tr><td></td><th>a</th></tr>"),
        ('<th class="head"><p></p></th>', "<td></td>"),
        ('<section id="proof-of-concept">', '<section id="proof-of-concept">'),
        ('<p role="list">', '<p role="list">'),
    ],
)
def test_repairs(there, belongs):
    assert tidy.tidy(there) == belongs
