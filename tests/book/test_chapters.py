"""Every chapter keeps the standard of CONTRIBUTING.md."""

import re

import jupytext
import pytest
from jupytext.config import load_jupytext_config

from tools import exercises, manifest, source
from tools.manifest import ROOT

BOOK = manifest.read()
CORE = [chapter for chapter in BOOK.chapters if chapter.tier != "appendix"]
FORMULA = re.compile(r"```\{math\}.*?```|\$\$.*?\$\$|\$[^$]*\$", re.DOTALL)
DRAWS = re.compile(r"plt\.(?:show|subplots|figure)\(|figures\.compare_matrices\(")


def each(chapters):
    return pytest.mark.parametrize("chapter", chapters, ids=lambda chapter: chapter.slug)


@pytest.fixture
def notebook(chapter):
    return source.read(BOOK, chapter)


def headings(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^## +(.+?)\s*$", prose, re.MULTILINE)


@each(CORE)
def test_parts_of_a_chapter(chapter, notebook):
    found = headings(notebook)
    assert found[0] == "The question"
    for title in ("Exercises", "What to remember", "Further reading"):
        assert title in found, f"no section {title!r}"
    assert found.index("What to remember") < found.index("Further reading")


@each(CORE)
def test_the_question_is_followed_by_a_figure(chapter, notebook):
    """The picture of the answer stands in the first section."""
    sections = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            sections += len(re.findall(r"^## ", cell.source, re.MULTILINE))
        elif "figure" in cell.metadata.get("mystnb", {}):
            break
    assert sections == 1


@each(CORE)
def test_three_lines_to_remember(chapter, notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    section = prose.partition("## What to remember")[2].partition("\n## ")[0]
    assert len(re.findall(r"^(?:\d+\.|[-*]) ", section, re.MULTILINE)) == 3


@each(CORE)
def test_at_least_three_exercises(chapter, notebook):
    found, problems = exercises.collect(chapter, notebook)
    assert problems == []
    assert len(found) >= 3


@each(BOOK.chapters)
def test_the_readme_leads_to_every_chapter(chapter):
    assert f"(chapters/{chapter.slug}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@each(BOOK.chapters)
def test_figures_have_name_caption_and_alt_text(chapter, notebook):
    for number, cell in source.code_cells(notebook):
        if not DRAWS.search(cell.source):
            continue
        where = source.describe(chapter, number, cell)
        figure = cell.metadata.get("mystnb", {})
        assert re.fullmatch(r"fig-[a-z0-9-]+", figure.get("figure", {}).get("name", "")), f"{where}: no figure name"
        assert len(figure["figure"].get("caption", "")) > 20, f"{where}: no caption"
        assert len(figure.get("image", {}).get("alt", "")) > 20, f"{where}: no alt text"


@each(CORE)
def test_code_is_shown_from_its_room(chapter, notebook):
    cells = [cell.source for _, cell in source.code_cells(notebook)]
    assert any("show_source(" in text for text in cells)
    for text in cells:
        shown = [n for n, line in enumerate(text.splitlines()) if line.startswith("show_source(")]
        assert all(n == len(text.splitlines()) - 1 for n in shown), f"only the last line of a cell is shown: {text}"
    for text in cells:
        assert not re.search(r"(?:from|import) kfqn_core[.\w]*\._|from kfqn_core[^\n]* import _", text), (
            "a private name"
        )


COSTS = re.compile(
    r"^# .*\n\n\*Reading: about (\d+) minutes\. Exercises: (\d+), with (\d+) points(?: for code and (\d+) for words)?; "
    r"about (\d+) minutes\.\*\n"
)
PER_MINUTE = 55  # words and formulas, counted as a shell would


@each([chapter for chapter in CORE if chapter.number is not None])
def test_a_chapter_says_at_its_top_what_it_costs(chapter, notebook):
    reading, *said = (int(number or 0) for number in COSTS.match(notebook.cells[0].source).groups())
    tasks = exercises.collect(chapter, notebook)[0]
    words = sum(task.rubric.points for task in tasks if task.rubric)
    assert said == [len(tasks), sum(task.points for task in tasks), words, sum(task.minutes for task in tasks)]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    prose = re.sub(r"^:::\{(exercise|solution)-start\}.*?^:::\{\1-end\}", "", prose, flags=re.MULTILINE | re.DOTALL)
    assert abs(len(prose.split()) / PER_MINUTE / reading - 1) < 0.15, len(prose.split())


@each(CORE)
def test_code_fits_the_column_of_a_page(chapter, notebook):
    """A box on the site shows 95 characters; what is longer is cut."""
    for number, cell in source.code_cells(notebook):
        for line in cell.source.splitlines():
            assert len(line) <= 95, f"{source.describe(chapter, number, cell)}: {len(line)} columns: {line}"


BEGINS_A_BLOCK = re.compile(r"[ \t]*(?:[-+*]|1[.)]|#{1,6}|>)[ \t]")


@each(BOOK.chapters)
def test_no_line_of_a_formula_in_a_sentence_begins_a_list(chapter, notebook):
    """A line such as `+ b$` ends the paragraph, and the formula is shown as it was typed."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"`+[^`]*`+|\\\$|\$\$.*?\$\$", "", cell.source, flags=re.DOTALL)
            lines = [line for formula in re.findall(r"\$[^$]*\$", text) for line in formula.splitlines()[1:]]
            assert not [line for line in lines if BEGINS_A_BLOCK.match(line)]


@each(CORE)
def test_a_chapter_can_be_read_in_one_sitting(chapter, notebook):
    words = code = before = 0
    shown = False  # the first picture
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = FORMULA.sub(" ", exercises.RUBRIC.sub("", cell.source))  # rubrics are for graders
            words += len(re.findall(r"[^\W\d_][\w'’-]*", text))
            continue
        shown = shown or "figure" in cell.metadata.get("mystnb", {})
        closed = {"hide-input", "remove-input", "hide-cell", "remove-cell"} & set(cell.metadata.get("tags", []))
        if not closed and not {"verifies", "level", "nbgrader"} & cell.metadata.keys():
            lines = sum(bool(line.strip()) for line in cell.source.splitlines())
            code += lines
            before += 0 if shown else lines
    assert 1_500 < words <= 5_000
    assert code <= 250
    assert before <= 10


@each(BOOK.chapters)
def test_saving_in_jupyterlab_would_change_nothing(chapter):
    text = chapter.path.read_text(encoding="utf-8")
    config = load_jupytext_config(str(chapter.path))
    saved = jupytext.writes(jupytext.reads(text, fmt="md:myst", config=config), fmt="md:myst", config=config)
    assert text == saved, "run `make format`"


def test_labels_are_unique_over_the_book():
    labels = []
    for chapter in BOOK.chapters:
        notebook = source.read(BOOK, chapter)
        labels += [d.label for d in source.directives(notebook) if d.label]
        figures = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in notebook.cells]
        labels += [figure["name"] for figure in figures if figure]
    assert sorted(labels) == sorted(set(labels))


def test_prose_directives_show_their_text_in_jupyterlab():
    """A colon fence renders as text where MyST is not understood; a backtick fence renders as code."""
    for chapter in BOOK.chapters:
        for fence in re.findall(r"^`{3,}\{([\w:-]+)\}", chapter.path.read_text(encoding="utf-8"), re.MULTILINE):
            assert fence in ("code-cell", "math"), f"{chapter.slug}: write {{{fence}}} with a colon fence"


def test_the_bibliography_has_no_duplicate():
    entries = re.findall(r"^@\w+\{([^,]+),", (ROOT / "chapters" / "references.bib").read_text(), re.MULTILINE)
    assert sorted(entries) == sorted(set(entries))
