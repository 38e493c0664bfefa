"""Pages of the site as one document to print: a title, a table of contents, and every page's article in its order.

In the student's edition solutions and graders are left out, in the instructor's they stand open. The code that the site
closes, mostly that of figures, is in neither.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from bs4 import BeautifulSoup, Tag

from tools.manifest import Book

EDITIONS = {"student": "", "instructor": "Instructor's edition, with solutions and rubrics"}
GRADER = "Grader:"  # how the site names the box with a grader (tools/toggles.py)
HEADING = "--heading-"  # in the name of a heading that the table of contents leads to
SEPARATE = "--"  # between the name of a page and that of a place on it
GONE = "a.headerlink, button, script, .toctree-wrapper, .prev-next-area, div.admonition.dropdown > .toggle-button"
LOCAL = re.compile(r"^(?![a-z][a-z0-9+.-]*:|//)")


@dataclass(frozen=True)
class Part:
    """One page of the site."""

    name: str  # "05-one-kronecker-product"
    article: Tag

    @property
    def headings(self) -> list[Tag]:
        """The titles of the page and of its sections."""
        return self.article.find_all(["h1", "h2"])


def names(folder: Path, book: Book) -> list[str]:
    """The pages of the whole book, in the order of the site: home, chapters and appendices, literature."""
    chapters = [chapter.slug for chapter in book.chapters]
    return [name for name in ("index", *chapters, "bibliography") if (folder / f"{name}.html").is_file()]


def document(
    book: Book, folder: Path, chosen: list[str], edition: str, pages: Mapping[str, int] | None = None
) -> BeautifulSoup:
    """The pages `chosen` of the site in `folder`; `pages` are the numbers in the table of contents, by heading's id."""
    sources = {
        name: BeautifulSoup((folder / f"{name}.html").read_text(encoding="utf-8"), "html.parser") for name in chosen
    }
    parts = [Part(name, _article(name, source, edition, chosen)) for name, source in sources.items()]
    first = sources[chosen[0]]
    made = BeautifulSoup(f'<!DOCTYPE html><html lang="{book.language}" data-theme="light"></html>', "html.parser")
    root = made.html
    root.append(_head(first, made))
    body = made.new_tag("body", attrs={"class": "edition"})
    root.append(body)
    whole = len(chosen) > 1
    if whole:
        body.append(_title(book, edition, made))
        body.append(_contents(parts, pages or {}, made))
    elif EDITIONS[edition]:
        note = made.new_tag("p", attrs={"class": "edition-note"})
        note.string = EDITIONS[edition]
        body.append(note)
    for part in parts:
        body.append(part.article)
    for tag in made.find_all(src=LOCAL) + made.find_all(href=re.compile(r"^(?!#)(?![a-z][a-z0-9+.-]*:|//)")):
        for key in ("src", "href"):
            if LOCAL.match(tag.get(key, "#:")) and not tag.get(key, "#").startswith("#"):
                tag[key] = (folder.resolve() / unquote(tag[key].partition("?")[0])).as_uri()
    for image in made.find_all("img"):
        image.attrs.pop("loading", None)  # nothing waits until somebody scrolls
    return made


def titles(document: BeautifulSoup) -> list[str]:
    """All headings of a document, as plain text."""
    found = document.body.find_all([f"h{level}" for level in range(1, 7)])
    return [" ".join(re.sub(r"\\\(|\\\)", "", heading.get_text()).split()) for heading in found]


def _head(page: BeautifulSoup, made: BeautifulSoup) -> Tag:
    """The styles of the site, and MathJax with its settings; no other script."""
    head = made.new_tag("head")
    head.append(made.new_tag("meta", attrs={"charset": "utf-8"}))
    title = made.new_tag("title")
    title.string = page.title.get_text(strip=True)
    head.append(title)
    for tag in page.head.find_all(["link", "script"]):
        is_style = tag.name == "link" and "stylesheet" in tag.get("rel", [])
        is_mathjax = tag.name == "script" and ("mathjax" in tag.get("src", "") or "window.MathJax" in tag.get_text())
        if is_style or is_mathjax:
            head.append(copy.copy(tag))
    return head


def _article(name: str, page: BeautifulSoup, edition: str, chosen: list[str]) -> Tag:
    """The article of a page, with what the edition shows, and names that no other page has."""
    article = page.find("article")
    for tag in article.select(GONE):
        tag.decompose()
    for section in article.select("section"):
        if [child.name for child in section.find_all(True, recursive=False)] == ["h2"]:
            section.decompose()  # it had listed the pages, as the table of contents does
    for box in article.select("details"):
        if box.decomposed:
            continue
        summary = box.find("summary")
        if summary is None or edition == "student" or not summary.get_text(strip=True).startswith(GRADER):
            box.decompose()
            continue
        summary.name, summary.attrs = "p", {"class": "edition-box"}
        summary.string = summary.find("p").get_text(strip=True)
        box.name, box.attrs = "div", {"class": "edition-grader"}
    for solution in article.select("div.solution"):
        if edition == "student":
            solution.decompose()
        else:
            solution["class"] = [kind for kind in solution["class"] if kind != "dropdown"]
    for tag in article.find_all(id=True):
        tag["id"] = f"{name}{SEPARATE}{tag['id']}"
    for link in article.find_all("a", href=LOCAL):
        target = _inside(name, link["href"], chosen)
        if target is None:
            link.unwrap()  # what is not in the document
        else:
            link["href"] = f"#{target}"
    article["id"] = name
    for number, heading in enumerate(article.find_all(["h1", "h2"])):
        heading["id"] = f"{name}{HEADING}{number}"
    return article


def _inside(name: str, href: str, chosen: list[str]) -> str | None:
    """The place in the document that a link of the page `name` leads to."""
    page, _, place = href.partition("#")
    page = page.removesuffix(".html") or name
    if page not in chosen:
        return None
    return f"{page}{SEPARATE}{unquote(place)}" if place else page


def _title(book: Book, edition: str, made: BeautifulSoup) -> Tag:
    page = made.new_tag("div", attrs={"class": "edition-title"})
    for kind, text in (
        ("h1", book.title),
        ("p", book.description),
        ("p", ", ".join(book.authors)),
        ("p", EDITIONS[edition]),
        ("p", "Text CC BY 4.0, code MIT"),
    ):
        if text:
            line = made.new_tag(kind)
            line.string = text
            page.append(line)
    return page


def _contents(parts: list[Part], pages: Mapping[str, int], made: BeautifulSoup) -> Tag:
    """Titles of pages and sections; every line leads to its place and ends in its page."""
    box = made.new_tag("nav", attrs={"class": "edition-contents"})
    heading = made.new_tag("p", attrs={"class": "edition-heading"})
    heading.string = "Contents"
    box.append(heading)
    for part in parts:
        for title in part.headings:
            line = made.new_tag("a", attrs={"href": f"#{title['id']}", "class": f"level-{title.name}"})
            words = made.new_tag("span")
            for child in title.contents:
                words.append(copy.copy(child))
            number = made.new_tag("span", attrs={"class": "page"})
            number.string = str(pages.get(title["id"], ""))
            line.extend([words, number])
            box.append(line)
    return box
