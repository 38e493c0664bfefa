"""What every label is called on the site: "Theorem 1.1", "(1.4)", "Fig. 2.3", "Ren and Goldfarb, 2021".

Sphinx counts while it builds; a notebook that leaves the book has to be told. The count here is the settings' of
`site/conf.py`: by chapter, claims of every kind sharing one count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode
from pybtex.database import Entry, Person, parse_file
from pybtex.richtext import Text

from tools import source
from tools.manifest import Book, Chapter

SHARED = {"theorem": "theorem", "lemma": "theorem", "proposition": "theorem", "corollary": "theorem"}
BOX = re.compile(r"prf:(?!proof)(\w+)")
COUNTED = re.compile(rf"\$\$[ \t]*\((?P<equation>[\w-]+)\)|{source.DIRECTIVE.pattern}", re.MULTILINE)


@dataclass(frozen=True)
class Numbers:
    """The names of labels, chapters and references of a book."""

    labels: dict[str, str]  # "thm-kron-action": "Theorem 1.1"; of an equation the number in brackets
    titles: dict[str, str]  # of exercises, by label
    chapters: dict[str, Chapter]
    references: dict[str, Entry]

    def chapter(self, slug: str) -> str:
        chapter = self.chapters[slug]
        return f"chapter {chapter.number}, *{chapter.title}*" if chapter.number else f"the appendix *{chapter.title}*"

    def citation(self, key: str, in_text: bool = False) -> str:
        """`Ren and Goldfarb, 2021`, or in a sentence `Ren and Goldfarb (2021)`."""
        entry = self.references[key]
        people = [_surname(person) for person in entry.persons.get("author") or entry.persons["editor"]]
        names = people[0] if len(people) == 1 else f"{people[0]} and {people[1]}" if len(people) == 2 else ""
        names, year = names or f"{people[0]} et al.", entry.fields["year"]
        return f"{names} ({year})" if in_text else f"{names}, {year}"

    def title_of_reference(self, key: str) -> str:
        return str(Text.from_latex(self.references[key].fields["title"]))


def of(book: Book) -> Numbers:
    """Count through the whole book."""
    labels: dict[str, str] = {}
    titles: dict[str, str] = {}
    for chapter in book.chapters:
        count: Counter[str] = Counter()
        for kind, label, title in _labelled(source.read(book, chapter)):
            counter = SHARED.get(kind, kind)
            count[counter] += 1
            number = f"{chapter.number}.{count[counter]}" if chapter.number else str(count[counter])
            if label:
                labels[label] = {"equation": f"({number})", "figure": f"Fig. {number}"}.get(
                    kind, f"{kind.capitalize()} {number}"
                )
                titles[label] = title
    bibliography = book.src / "references.bib"
    entries = dict(parse_file(bibliography).entries) if bibliography.is_file() else {}
    return Numbers(labels, titles, {chapter.slug: chapter for chapter in book.chapters}, entries)


def _labelled(notebook: NotebookNode) -> Iterator[tuple[str, str | None, str]]:
    """Everything that is counted, in order: its kind, label and title."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if "figure" in cell.metadata.get("mystnb", {}):
                yield "figure", cell.metadata.mystnb.figure.get("name"), ""
            continue
        for match in COUNTED.finditer(cell.source):
            if match["equation"]:
                yield "equation", match["equation"], ""
                continue
            box, label = BOX.fullmatch(match["name"]), source.LABEL.search(match["options"])
            kind = box[1] if box else "exercise" if match["name"] in ("exercise", "exercise-start") else None
            if kind:
                yield kind, label[1] if label else None, match["title"].strip()


def _surname(person: Person) -> str:
    return str(Text.from_latex(" ".join([*person.prelast_names, *person.last_names])))
