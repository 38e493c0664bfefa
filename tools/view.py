"""MyST as JupyterLab shows it with the numbers and links of the site, and back again.

JupyterLab counts anew in every notebook and knows nothing of the others. So boxes and equations are told their numbers,
and a reference becomes a link that carries, as its title, what was written; `written` takes all of it away again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tools import numbers, source
from tools.manifest import Book, Chapter
from tools.numbers import BOX, Numbers
from tools.plain import CODE, EQUATION, ROLE, TARGET

LABELLED = ("prf:ref", "ref", "numref", "eq")
OPENING = re.compile(
    r"^(?P<line>:{3,}\{(?P<name>[\w:-]+)\}[^\n]*\n)(?P<options>(?::[\w-]+:[^\n]*(?:\n|\Z))*)", re.MULTILINE
)
ADDED = re.compile(r"^(:{3,}\{[\w:-]+\}[^\n]*\n):enumerat(?:or|ed): [^\n]*\n", re.MULTILINE)
TAG = re.compile(r"\\tag\{[^}\n]*\}(?=\$\$[ \t]*\([\w-]+\))")
# A bracket before it that nobody closed, as of an interval [0, 1), is no part of it.
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(\S* \"(\{[\w:]+\}`[^`\"]+`)\"\)")
END = re.compile(r"^(:{3,}\{solution-end\}[ \t]*)\n(:{3,}[ \t]*)$", re.MULTILINE)
COMMENT = re.compile(r"^% (:{3,}\{solution-end\}[ \t]*)\n% (:{3,}[ \t]*)$", re.MULTILINE)
RESOLVER = "https://doi.org/"


@dataclass(frozen=True)
class View:
    """What a book's labels are called, and where they are."""

    numbers: Numbers
    places: dict[str, tuple[str, int]]  # of a label: the chapter's slug, and the cell's place in it

    def shown(self, chapter: Chapter | None, text: str) -> str:
        """The text of a cell of `chapter` with numbers and links."""

        def change(part: str) -> str:
            part = EQUATION.sub(self._tagged, self._linked(chapter, part))
            return END.sub(r"% \1\n% \2", OPENING.sub(self._numbered, part))  # a box around nothing

        return _outside_code(text, change)

    def caption(self, chapter: Chapter | None, name: str, caption: str) -> str:
        """What stands below a figure."""
        return self.shown(chapter, f"*{self.numbers.labels.get(name, 'Figure')}.* {caption}")

    def _tagged(self, match: re.Match[str]) -> str:
        name = self.numbers.labels.get(match[1])
        return rf"\tag{{{name[1:-1]}}}{match[0]}" if name else match[0]

    def _numbered(self, match: re.Match[str]) -> str:
        if match["name"] == "prf:proof":
            return f"{match['line']}:enumerated: false\n{match['options']}"
        label = source.LABEL.search(match["options"])
        if not label or label[1] not in self.numbers.labels:
            return match[0]
        if not BOX.fullmatch(match["name"]) and match["name"] != "exercise-start":
            return match[0]
        number = self.numbers.labels[label[1]].rpartition(" ")[2]
        return f"{match['line']}:enumerator: {number}\n{match['options']}"

    def _linked(self, chapter: Chapter | None, text: str) -> str:
        def link(match: re.Match[str]) -> str:
            found = self._link(chapter, match[1], match[2])
            if found is None or '"' in match[0] or "]" in found[0]:  # `written` could not tell where the link ends
                return match[0]
            return f'[{found[0]}]({found[1]} "{match[0]}")'

        return ROLE.sub(link, text)

    def _link(self, chapter: Chapter | None, role: str, content: str) -> tuple[str, str] | None:
        """Text and address of a reference; None for one that is left as it is."""
        if role.startswith("cite"):
            keys = [key.strip() for key in content.split(",")]
            if not all(key in self.numbers.references for key in keys):
                return None
            names = [self.numbers.citation(key, in_text=role == "cite:t") for key in keys]
            text = " and ".join(names) if role == "cite:t" else f"({'; '.join(names)})"
            doi = self.numbers.references[keys[0]].fields.get("doi")
            return text, f"{RESOLVER}{doi}" if doi else "references.bib"
        explicit = TARGET.match(content)
        target = explicit["target"] if explicit else content
        if role == "doc" and target in self.numbers.chapters:
            return explicit["text"] if explicit else self.numbers.chapters[target].title, f"{target}.md"
        if role in LABELLED and target in self.places:
            slug, cell = self.places[target]
            name = self.numbers.labels[target]
            here = chapter is not None and slug == chapter.slug and not name.startswith("Fig.")
            address = f"#{target}" if here else f"{slug}.md#cell-id={cell_id(cell)}"
            return explicit["text"] if explicit else name, address
        return None


def of(book: Book) -> View:
    """Read the whole book."""
    places = {}
    for chapter in book.chapters:
        for i, cell in enumerate(source.read(book, chapter).cells):
            if cell.cell_type == "markdown":
                labels = EQUATION.findall(cell.source) + source.LABEL.findall(cell.source)
            else:
                labels = [cell.metadata.get("mystnb", {}).get("figure", {}).get("name")]
            places |= dict.fromkeys(filter(None, labels), (chapter.slug, i))
    counted = numbers.of(book)
    return View(counted, {label: place for label, place in places.items() if label in counted.labels})


def cell_id(number: int) -> str:
    """The id of a cell by its place in the chapter: what a link from another chapter names."""
    return f"cell-{number}"


def written(text: str) -> str:
    """The text as it stands in the chapter."""
    return _outside_code(
        text, lambda part: TAG.sub("", ADDED.sub(r"\1", LINK.sub(r"\1", COMMENT.sub(r"\1\n\2", part))))
    )


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text with `change` made in everything but fenced code."""
    parts: list[tuple[bool, list[str]]] = [(False, [])]
    fence = ""
    for line in text.split("\n"):
        if found := CODE.match(line):
            if fence and line.startswith(fence):
                parts[-1][1].append(line)
                parts.append((False, []))
                fence = ""
                continue
            if not fence:
                fence = found[1]
                parts.append((True, []))
        parts[-1][1].append(line)
    return "\n".join("\n".join(lines) if is_code else change("\n".join(lines)) for is_code, lines in parts if lines)
