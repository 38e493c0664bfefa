"""What of a chapter is shown in a lecture, section by section: its question, key formulas, claims, figures, one check.

Prose stays in the chapter. Of a section that has none of these nothing is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode

from tools import exercises, ledger, source
from tools.exercises import Exercise
from tools.manifest import Chapter

SHOWN = {"theorem", "lemma", "proposition", "corollary", "definition", "algorithm", "assumption", "observation"}
QUESTION, REMEMBER = "The question", "What to remember"
HEADING = re.compile(r"^(#{1,3}) +(.+?)\s*$")
DISPLAY = re.compile(r"^\$\$.*?\$\$(?:[ \t]*\(([\w-]+)\))?", re.MULTILINE | re.DOTALL)
MATH = re.compile(r"\$[^$]+\$")
SENTENCE_END = re.compile(r"(?<=[.?!\x01])(?<!i\.e\.)(?<!e\.g\.)(?<!cf\.)\s+(?=[A-Z({\x00\x02`*])")
WORDS = 45  # of a caption or a sentence around a formula; the rest is said, not shown


@dataclass(frozen=True)
class Slide:
    """One slide: `text` is MyST, `cell` a figure or a check that stands below it."""

    section: str  # MyST; the same for all slides of a `##` section
    title: str  # MyST, of the `###` subsection if there is one
    text: str = ""
    cell: NotebookNode | None = None
    is_figure: bool = False


@dataclass(frozen=True)
class _Block:
    kind: str  # "heading", "box" or "prose"
    text: str
    level: int = 0


def slides(chapter: Chapter, notebook: NotebookNode) -> list[Slide]:
    """The slides of a chapter after its title, from its executed notebook."""
    tasks = exercises.collect(chapter, notebook)[0]
    cells = exercises.without_exercises(notebook).cells
    checked = _the_check(chapter, notebook)
    section = title = ""
    found: list[Slide] = []
    for cell in cells:
        if cell.cell_type == "code":
            if "figure" in cell.metadata.get("mystnb", {}):
                found.append(Slide(section, title, cell=cell, is_figure=True))
            elif checked and cell.source == checked.source:
                claims = " and ".join(f"{{prf:ref}}`{label}`" for label in checked.verifies)
                found.append(Slide(section, f"The check of {claims}", cell=cell))
            continue
        for block in _blocks(cell.source):
            if block.kind == "heading":
                title = block.text
                section = title if block.level == 2 else section
            elif block.kind == "box":
                found.append(Slide(section, title, block.text))
            else:
                found += [Slide(section, title, text) for text in _shown_prose(title, block.text, found)]
    if tasks:
        found.append(Slide("Exercises", "Exercises", "\n".join(map(_exercise, tasks))))
    return found


def _shown_prose(title: str, text: str, before: list[Slide]) -> list[str]:
    """The question, all of what is to be remembered, and elsewhere the sentences around numbered formulas."""
    if title == REMEMBER:
        return [text]
    if title == QUESTION and not (before and before[-1].section == QUESTION):
        return [text.split("\n\n")[0]]
    return _key_formulas(text)


def _key_formulas(text: str) -> list[str]:
    """Sentences that hold a labelled formula; of a long sentence the formulas alone."""
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        kind = "\x00" if match.re is DISPLAY else "\x02"
        ends = "\x01" if match.re is DISPLAY and re.search(r"\.\s*\$\$", match[0]) else ""
        return f"{kind}{len(hidden) - 1}{kind}{ends}"

    def show(part: str) -> str:
        part = part.replace("\x01", "")
        for mark in ("\x00", "\x02"):
            part = re.sub(f"{mark}(\\d+){mark}", lambda match: hidden[int(match[1])], part)
        return part.strip()

    flow = MATH.sub(hide, DISPLAY.sub(hide, text))
    kept = []
    for sentence in SENTENCE_END.split(flow):
        displays = [hidden[int(i)] for i in re.findall("\x00(\\d+)\x00", sentence)]
        labelled = [display for display in displays if DISPLAY.match(display)[1]]
        if not labelled:
            continue
        short = len(re.sub("\x00\\d+\x00", "", sentence).split()) <= WORDS
        kept.append(show(sentence) if short else "\n\n".join(labelled))
    return kept


def _blocks(text: str) -> Iterator[_Block]:
    """Headings, boxes that are shown, and the prose between them; proofs, code and tables are left out."""
    lines = text.splitlines()
    prose: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if heading := HEADING.match(line):
            yield from _prose(prose)
            yield _Block("heading", heading[2], len(heading[1]))
        elif fence := re.match(r"^(:{3,}|`{3,})", line):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].rstrip() == fence[1]), len(lines) - 1)
            box = re.match(r"^:{3,}\{prf:(\w+)\}", line)
            yield from _prose(prose)
            if box and box[1] in SHOWN:
                yield _Block("box", "\n".join(lines[i : end + 1]))
            i = end
        elif line.startswith("|"):
            yield from _prose(prose)
        else:
            prose.append(line)
        i += 1
    yield from _prose(prose)


def _prose(lines: list[str]) -> Iterator[_Block]:
    text = "\n".join(lines).strip()
    lines.clear()
    if text:
        yield _Block("prose", text)


def _the_check(chapter: Chapter, notebook: NotebookNode) -> ledger.Check | None:
    """The check that is shown: the shortest of those of theorems, or of all claims where there are none of theorems."""
    kinds = {task.label: task.name for task in source.directives(notebook) if task.name.startswith("prf:")}
    checks = ledger.checks(chapter, notebook)[0]
    of_theorems = [check for check in checks if "prf:theorem" in map(kinds.get, check.verifies)]
    return min(of_theorems or checks, key=lambda check: len(check.source.splitlines()), default=None)


def caption(cell: NotebookNode) -> str:
    """A figure's caption, of a long one the first sentence."""
    text = " ".join(cell.metadata.mystnb.figure.get("caption", "").split())
    return text if len(text.split()) <= WORDS else SENTENCE_END.split(text)[0]


def _exercise(task: Exercise) -> str:
    return f"* {{ref}}`{task.label}`, {task.title}: {task.facts}"
