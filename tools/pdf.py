"""The site on paper: the book, or one chapter, as a PDF without solutions, or the instructor's with them.

python -m tools.pdf                         out/pdf/book.pdf
python -m tools.pdf --only 02               out/pdf/02-quasi-newton.pdf
python -m tools.pdf --edition instructor    out/pdf/book-instructor.pdf, solutions and rubrics open

Prints what the site shows (`make book`, or `make chapter N=02` for one page); Chromium does it, without a window.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from pypdf import PdfReader, PdfWriter
from pypdf.generic import Destination, NameObject, TextStringObject

from tools import browser, edition, manifest, notebooks, site
from tools.manifest import Book, Chapter

# A4 in inches; at the sides as site/_static/print.css has it.
PAPER = {"paperWidth": 8.27, "paperHeight": 11.69, "marginTop": 0.75, "marginBottom": 0.75}
SIDE = 0.67
PATIENCE_S = 900  # thousands of formulas, on a busy machine
PRINTS = 5  # two are needed, a third if the contents get longer by their numbers
WIDTH = round((PAPER["paperWidth"] - 2 * SIDE) * 96)  # of the column, in pixels
LINE = (
    '<div style="font: 8px sans-serif; color: #555; width: 100%; padding: 0 {side}in; display: flex; '
    'justify-content: space-between"><span>{left}</span><span class="pageNumber"></span></div>'
)
# What is wider than the column is made as small as it has to be; then says what is not as it should be.
FIT = """(() => {
  // Everything is read before anything is written: the book is laid out once, not once for each formula.
  const ratios = Array.from(document.querySelectorAll("mjx-container, table"), (box) => {
    const inner = box.querySelector("mjx-math") || box;
    const around = box.parentElement.closest("p, li, td, div, a, h1, h2, h3");
    const room = box.matches("mjx-container[display='true']") ? box : around;
    return [box, room.clientWidth / inner.getBoundingClientRect().width];
  });
  for (const [box, ratio] of ratios)
    if (ratio > 0 && ratio < 1) box.style.zoom = Math.floor(ratio * 100) / 100;
  const wrong = [];
  for (const math of document.querySelectorAll(".math"))
    if (!math.querySelector("mjx-container") || math.querySelector("mjx-merror"))
      wrong.push(`a formula that is not set: ${math.textContent.slice(0, 80)}`);
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) wrong.push(`a picture that is not there: ${image.src}`);
  return wrong;
})()"""


class PdfError(Exception):
    """The PDF cannot be printed from what is there."""


def build(book: Book, kind: str, only: Chapter | None = None) -> Path:
    """Print the book or a chapter; a failed print leaves the last PDF in place."""
    if browser.find() is None:
        raise PdfError("The PDF is printed by Chromium, and there is none: install chromium, or Google Chrome.")
    folder = folder_of(book, only)
    chosen = [only.slug] if only else edition.names(folder, book)
    name = only.slug if only else "book"
    path = book.root / "out" / "pdf" / f"{name}{'' if kind == 'student' else f'-{kind}'}.pdf"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{book.title}{f': {only.name}' if only else ''}"
    with TemporaryDirectory(prefix=".pdf-", dir=path.parent) as place, browser.Browser(PATIENCE_S) as tab:
        html, new = Path(place) / "book.html", Path(place) / "book.pdf"

        def attempt(pages: dict[str, int]) -> dict[str, int]:
            html.write_text(str(edition.document(book, folder, chosen, kind, pages)), encoding="utf-8")
            new.write_bytes(_print(tab, html, title))
            return {} if only else _headings(new)

        pages = settled(attempt)
        _name_outline(new, edition.titles(edition.document(book, folder, chosen, kind, pages)))
        new.replace(path)
    return path


def settled(attempt: Callable[[dict[str, int]], dict[str, int]]) -> dict[str, int]:
    """The page of every heading, which the table of contents names: known once it has been printed, so print again.

    Args:
        attempt: prints with these numbers in the contents, and returns those of the pages as printed.
    """
    pages: dict[str, int] = {}
    for _ in range(PRINTS):
        found = attempt(pages)
        if found == pages:
            return pages
        pages = found
    raise PdfError(
        f"The PDF was printed {PRINTS} times, and its contents still name other pages than those on which the headings "
        "stand: the contents change their length with their numbers. Print single chapters: make pdf N=02"
    )


def folder_of(book: Book, only: Chapter | None) -> Path:
    """The folder of the site that is printed: for one chapter the one with its newest page."""
    out = book.root / "out"
    if only is None:
        if not (out / "html" / "index.html").is_file():
            raise PdfError("There is no site to print: `make book` builds it. One chapter: make pdf N=02")
        if (out / "html" / site.INCOMPLETE).exists():
            raise PdfError("Chapters of the site have no results: `make book` says which. One chapter: make pdf N=02")
        return out / "html"
    pages = [folder / f"{only.slug}.html" for folder in (out / "html", out / "chapter")]
    pages = [page for page in pages if page.is_file()]
    if not pages:
        raise PdfError(f"{only.slug} has no page to print: `make chapter N={_short(only)}` builds it.")
    return max(pages, key=lambda page: page.stat().st_mtime).parent


def _short(chapter: Chapter) -> str:
    return chapter.slug if chapter.number is None else chapter.slug[:2]


def outdated(book: Book, folder: Path, chapters: tuple[Chapter, ...]) -> list[Chapter]:
    """Chapters that were changed, or whose code was, since their page was built."""
    found = []
    for chapter in chapters:
        shown = folder / "_sources" / f"{chapter.slug}.ipynb"
        stamp = nbformat.read(shown, as_version=4).metadata.get("stamp") if shown.is_file() else None
        if stamp != notebooks.stamp(book, chapter):
            found.append(chapter)
    return found


def _print(tab: browser.Browser, html: Path, title: str) -> bytes:
    tab.open(html, WIDTH, media="print")
    if wrong := tab.run(FIT):
        raise PdfError("The PDF was not printed:\n" + "\n".join(wrong[:20]))
    left = json.dumps(title)[1:-1].replace("<", "&lt;")
    printed = tab.call(
        "Page.printToPDF",
        **PAPER,
        marginLeft=SIDE,
        marginRight=SIDE,
        printBackground=True,
        displayHeaderFooter=True,
        headerTemplate="<span></span>",
        footerTemplate=LINE.format(left=left, side=SIDE),
        generateTaggedPDF=True,
        generateDocumentOutline=True,
    )
    return base64.b64decode(printed["data"])


def _headings(pdf: Path) -> dict[str, int]:
    """The page of every heading that something leads to."""
    reader = PdfReader(pdf)
    places = {name.removeprefix("/"): place for name, place in reader.named_destinations.items()}
    return {
        name: reader.get_destination_page_number(place) + 1 for name, place in places.items() if edition.HEADING in name
    }


def _name_outline(pdf: Path, titles: list[str]) -> None:
    """Write the titles into the outline, one for each heading: Chromium's lack spaces where a heading takes two lines,
    and have every word twice where something leads to it."""
    writer = PdfWriter(pdf, incremental=True)
    items = list(_flat(writer.outline))
    if len(items) != len(titles):
        raise PdfError(
            f"The PDF has {len(items)} headings where the pages have {len(titles)}: its outline is not right."
        )
    for item, title in zip(items, titles, strict=True):
        item.node[NameObject("/Title")] = TextStringObject(title)
    writer.write(pdf)


def _flat(items: list) -> Iterator[Destination]:
    for item in items:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.pdf", description="Print the site.")
    parser.add_argument("--only", metavar="NN", help="one chapter")
    parser.add_argument("--edition", choices=sorted(edition.EDITIONS), default="student")
    asked = parser.parse_args(arguments)
    try:
        book = manifest.load()
        only = book.find(asked.only) if asked.only else None
        path = build(book, asked.edition, only)
        old = outdated(book, folder_of(book, only), (only,) if only else book.chapters)
    except (manifest.ManifestError, PdfError) as error:
        print(error, file=sys.stderr)
        return 1
    if old:
        names = ", ".join(chapter.slug for chapter in old)
        print(f"Printed as the site shows them, changed since: {names}. `make book` brings the site up to date.")
    print(f"The PDF:  {path.as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
