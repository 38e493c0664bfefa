"""Every number about results in README and in chapter 13 comes from `benchmarks/results`."""

import re

import pandas as pd
import pytest

from benchmarks import readme
from benchmarks.methods import METHODS
from benchmarks.records import RESULTS, rounded
from benchmarks.tables import summary
from tools import manifest, source
from tools.manifest import ROOT

BOOK = manifest.read()
CHAPTER = next(chapter for chapter in BOOK.chapters if chapter.slug == "13-does-it-win")
RESULTS_SECTIONS = (
    "What came out",
    "Where it loses",
    "What the other factor is worth",
    "A live comparison",
    "What to remember",
)


@pytest.fixture(scope="module")
def frame():
    return pd.DataFrame(rounded(summary(list(readme.PROBLEMS), list(METHODS), RESULTS).to_dict("records")))


def test_readme_has_the_table_of_the_committed_results(frame):
    assert readme.README.read_text(encoding="utf-8") == readme.updated(frame), "run `python -m benchmarks report`"


def test_every_number_of_readmes_section_is_in_its_table_or_in_the_protocol():
    section = readme.README.read_text(encoding="utf-8").partition("## Does it win?")[2].partition("\n## ")[0]
    before, _, rest = section.partition(readme.BEGIN)
    prose = before + rest.partition(readme.END)[2]
    prose = re.sub(r"\]\([^)]*\)|\bP\d+\b", "", prose)  # addresses, names of problems
    # learning rate, coverage, widths of the inputs, variants tried, the seed of tuning, and a chapter's number
    allowed = {str(METHODS["kfqn"].default_lr), "95", "784", "64", "0", "13"}
    assert set(re.findall(r"\d+(?:\.\d+)?", prose)) <= allowed


def test_the_figure_of_readme_is_there():
    assert readme.FIGURE.is_file()
    assert f"({readme.FIGURE.relative_to(ROOT)})" in readme.README.read_text(encoding="utf-8")


def test_the_chapter_types_no_result():
    """Its prose about results holds no decimal, no percentage and no factor: these stand in the output of its cells."""
    notebook = source.read(BOOK, CHAPTER)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    sections = {part.partition("\n")[0]: part for part in re.split(r"^## ", prose, flags=re.MULTILINE)}
    for title in RESULTS_SECTIONS:
        text = re.sub(r"\$[^$]*\$|`[^`]*`|\{\w+\}`[^`]*`|\bP\d+\b", "", sections[title])
        found = re.findall(r"\d+\.\d+|\d+ ?%|\d+ (?:per ?cent|times)", text)
        assert found == [], f"{title}: typed numbers {found}; let a cell print them"


def test_the_chapter_reads_the_records():
    cells = "\n".join(cell.source for _, cell in source.code_cells(source.read(BOOK, CHAPTER)))
    assert "summary(PROBLEMS, list(METHODS), RESULTS)" in cells
    assert not re.search(r"DataFrame\(\s*[\[{]\s*[\"'\d]", cells), "a table that was typed"
