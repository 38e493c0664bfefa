"""Slides for a lecture, out/slides/NN-slug.html: a deck of reveal.js for each chapter, made from its executed notebook.

python -m tools.slides [NN ...]    by number or name; default: all numbered chapters

The decks load nothing from elsewhere: what they need lies beside them in `_assets`.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from nbconvert.filters import Highlight2HTML, ansi2html, markdown2html
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from tools import deck, manifest, notebooks, numbers, source
from tools.deck import Slide
from tools.manifest import Book, Chapter
from tools.numbers import Numbers
from tools.plain import Plain

ASSETS = "_assets"
REVEAL = ("dist/reveal.js", "dist/reveal.css", "dist/reset.css")  # of the package sphinx-revealjs
MATHJAX = ("tex-chtml.js", "output/chtml/fonts")  # of the package sphinx-mathjax-offline
OWN = ("slides.css", "slides.js")


class SlidesError(Exception):
    """A deck cannot be made from what is there."""


def build(book: Book, chosen: list[Chapter]) -> list[Path]:
    """Write the decks of `chosen` chapters; SlidesError if one of them was not executed as it stands."""
    for chapter in chosen:
        if chapter.number is None:
            raise SlidesError(f"{chapter.slug} is an appendix: there are slides of chapters, such as N=02")
        if not notebooks.is_fresh(book, chapter):
            raise SlidesError(
                f"{chapter.slug} was not executed since it, or the code it stands on, changed: "
                f"run `make slides N={chapter.slug[:2]}`, or `make book` for all"
            )
    out = book.root / "out" / "slides"
    out.mkdir(parents=True, exist_ok=True)
    _copy_assets(book, out / ASSETS)
    counted = numbers.of(book)
    written = []
    for chapter in chosen:
        notebook = nbformat.read(notebooks.published(book, chapter), as_version=4)
        path = out / f"{chapter.slug}.html"
        path.write_text(page(book, chapter, notebook, counted), encoding="utf-8")
        written.append(path)
    return written


def page(book: Book, chapter: Chapter, notebook: NotebookNode, counted: Numbers) -> str:
    """The deck of a chapter, as HTML."""
    render = Plain(counted)
    sections = [
        [_Shown(slide, render) for slide in group]
        for _, group in groupby(deck.slides(chapter, notebook), key=lambda slide: slide.section)
    ]
    templates = Environment(loader=FileSystemLoader(book.root / "site" / "slides"), autoescape=True)
    return templates.get_template("deck.html.j2").render(
        book=book,
        chapter=chapter,
        title=_line(chapter.title, render),
        before=[_line(render.numbers.chapter(slug), render) for slug in chapter.requires],
        sections=sections,
        assets=ASSETS,
    )


class _Shown:
    """A slide with its parts as HTML."""

    def __init__(self, slide: Slide, render: Plain) -> None:
        self.title = _line(slide.title or slide.section, render)
        text = render.text(slide.text)
        self.text = Markup(markdown2html(text[:1].upper() + text[1:]))  # it may begin with "chapter 3"
        self.code = self.printed = self.image = self.caption = Markup("")
        if slide.cell is not None and slide.is_figure:
            self.image = _image(slide.cell)
            name = _name(slide.cell, render)
            self.caption = _line(f"**{name}.** {deck.caption(slide.cell)}", render)
        elif slide.cell is not None:
            self.code = Markup(Highlight2HTML(pygments_lexer="ipython3")(slide.cell.source))
            printed = "".join(output.text for output in slide.cell.outputs if output.output_type == "stream")
            self.printed = Markup(ansi2html(printed.strip()))


def _name(cell: NotebookNode, render: Plain) -> str:
    """What the site calls a figure: "Fig. 2.3"."""
    name = cell.metadata.mystnb.figure.get("name", "")
    return render.numbers.labels.get(name, "Figure")


def _line(myst: str, render: Plain) -> Markup:
    """Text of one line as HTML without a paragraph around it."""
    html = markdown2html(render.text(myst)).strip()
    return Markup(html.removeprefix("<p>").removesuffix("</p>"))


def _image(cell: NotebookNode) -> Markup:
    alt = escape(" ".join(cell.metadata.mystnb.get("image", {}).get("alt", "").split()))
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            return Markup(f'<img alt="{alt}" src="data:image/png;base64,{"".join(data["image/png"].split())}">')
        if "image/svg+xml" in data:
            return Markup(f'<div role="img" aria-label="{alt}">{data["image/svg+xml"]}</div>')
    raise SlidesError(f"the figure {cell.metadata.mystnb.figure.get('name')} has no picture: execute its chapter again")


def _copy_assets(book: Book, target: Path) -> None:
    """Everything that a deck loads."""
    reveal, mathjax = _package("sphinx_revealjs"), _package("sphinx-mathjax-offline")
    places = [(reveal / "_static" / "revealjs", name, "reveal") for name in REVEAL]
    places += [(mathjax / "static" / "mathjax", name, "mathjax") for name in MATHJAX]
    places += [(book.root / "site" / "slides", name, "") for name in OWN]
    for folder, name, below in places:
        here, there = folder / name, target / below / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, there, dirs_exist_ok=True)
        else:
            shutil.copy(here, there)
    (target / "code.css").write_text(HtmlFormatter(style="default").get_style_defs(".highlight"), encoding="utf-8")


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SlidesError(f"{name} is not installed here: `make setup` installs it")
    return Path(spec.origin).parent


def main(names: list[str]) -> int:
    try:
        book = manifest.load()
        chosen = [book.find(name) for name in names] or [chapter for chapter in book.chapters if chapter.number]
        written = build(book, chosen)
    except (manifest.ManifestError, source.ChapterError, SlidesError) as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"The slides:  {path.as_uri()}")
    print("To print them, add ?print-pdf to the address.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
