"""Sphinx settings of the book; titles and numbers come from book.toml."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docutils import nodes
from sphinx.environment.collectors.toctree import TocTreeCollector

from tools import manifest

BOOK = manifest.read()

project = BOOK.title
author = ", ".join(BOOK.authors)
copyright = f"{author}. Text CC BY 4.0, code MIT"
language = BOOK.language

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_exercise",
    "sphinx_proof",
    "sphinx_copybutton",
    "sphinx_togglebutton",
    "sphinxcontrib.bibtex",
]
nb_execution_mode = "off"  # the notebooks come executed
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in what a cell displays
nb_ipywidgets_js = {}  # nothing is loaded from elsewhere
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
exercise_style = "solution_follow_exercise"  # the title of a solution opens it instead of linking to its exercise
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
mathjax3_config = {"options": {"enableMenu": False}}  # its menu makes a tab stop of each of thousands of formulas
autodoc_typehints = "description"
nitpick_ignore_regex = [("py:.*", ".*")]  # types of Python and torch, whose pages are not at hand without a network
bibtex_bibfiles = [str(BOOK.src / "references.bib")]
bibtex_reference_style = "author_year"

# Theorem 8.1, Figure 8.1 and (8.1) stand in chapter 8. Claims of every kind share one count, as in print.
numfig = True
numfig_secnum_depth = 1
math_numfig = True
math_eqref_format = "({number})"
prf_realtyp_to_countertyp = dict.fromkeys(["lemma", "proposition", "corollary"], "theorem")

html_theme = "sphinx_book_theme"
html_title = BOOK.title
html_use_index = html_domain_indices = False
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["book.css", ("print.css", {"media": "print"})]
html_js_files = [("book.js", {"defer": "defer"})]
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_theme_options = {
    "navbar_persistent": [],  # the sidebar has a search field already
    "search_bar_text": "Search the book",
    "show_toc_level": 2,
    "use_download_button": True,
}
togglebutton_open_on_print = False  # a reader prints what is open
togglebutton_hint = "Show"
togglebutton_hint_hide = "Hide"


def number_by_slug(app, env):
    """Give chapter NN-slug the number NN, whatever its place in the table of contents.

    Sphinx counts 1, 2, 3 within each part. Its count is overwritten in the three places that keep it (sections, table
    of contents, titles), and figures, theorems and equations are then counted again on top.
    """
    for chapter in BOOK.chapters:
        if chapter.number is None:
            continue

        def renumbered(secnumber, number=chapter.number):
            return type(secnumber)([number, *secnumber[1:]]) if secnumber else secnumber

        sections = env.toc_secnumbers[chapter.slug]
        env.toc_secnumbers[chapter.slug] = {anchor: renumbered(count) for anchor, count in sections.items()}
        for reference in env.tocs[chapter.slug].findall(nodes.reference):
            reference["secnumber"] = renumbered(reference.get("secnumber"))
        env.titles[chapter.slug]["secnumber"] = renumbered(env.titles[chapter.slug].get("secnumber"))
    return TocTreeCollector().assign_figure_numbers(env)


def formulas_in_links(app, doctree, docname):
    """A link to a chapter shows the formulas of its title, where Sphinx writes their source."""
    titles = {title.astext(): title for title in app.env.titles.values() if any(title.findall(nodes.math))}
    for link in doctree.findall(lambda node: isinstance(node, nodes.inline) and "doc" in node["classes"]):
        if title := titles.get(link.astext()):
            link.clear()
            link += [child.deepcopy() for child in title.children]


def formulas_keep_punctuation(app, doctree, docname):
    """A line does not begin with the full stop that follows a formula: browsers break on either side of one."""
    for formula in list(doctree.findall(nodes.math)):
        after = formula.next_node(descend=False, siblings=True)
        if not isinstance(after, nodes.Text) or not (marks := re.match(r"[.,;:?!)\]]+", after)):
            continue
        parent = formula.parent
        parent.replace(after, nodes.Text(after[marks.end() :]))
        parent.replace(formula, nodes.inline("", "", formula.deepcopy(), nodes.Text(marks[0]), classes=["together"]))


def as_rst(app, what, name, obj, options, lines):
    """Docstrings are written as Markdown is: an indented paragraph is code, as is what stands in single backticks."""
    text = "\n".join(lines)
    text = re.sub(r"(^|(?<=\n\n))( {4}.+)", r".. code-block:: python\n\n\2", text)
    lines[:] = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text).split("\n")
    if what in ("attribute", "property"):  # in whose first line Google's style takes what precedes a colon for a type
        lines[:0] = ["..", ""]  # an empty comment


def setup(app):
    app.set_html_assets_policy("always")  # the list of chapters has formulas, on pages without any as well
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before Google's sections are read
    app.connect("doctree-resolved", formulas_in_links)
    app.connect("doctree-resolved", formulas_keep_punctuation, priority=600)  # when links have their formulas
    app.connect("env-get-updated", number_by_slug, priority=600)  # after Sphinx's own collector, at 500
