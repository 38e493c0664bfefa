"""Executed notebooks into the site: stage the pages in `out/site-src`, build, and swap the result into `out/html`.

python -m tools.site
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sphinx.cmd.build import build_main

from tools import exercises, ledger, manifest, notebooks, source
from tools.manifest import Book, Chapter

EXERCISE_END = re.compile(r"^:{3,}\{exercise-end\}", re.MULTILINE)
SOLUTION_MARK = re.compile(r"^[ \t]*### (?:BEGIN|END) SOLUTION[ \t]*\n?", re.MULTILINE)


class SiteError(Exception):
    """The site cannot be built from what is there."""


def stage(book: Book, target: Path) -> None:
    """Write everything Sphinx reads into `target`, made anew."""
    entries = ledger.collect(book)
    if entries.problems:
        raise SiteError("the ledger has gaps:\n" + "\n".join(entries.problems))
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for chapter in book.chapters:
        nbformat.write(_page(book, chapter, entries.checks), target / f"{chapter.slug}.ipynb")
    shutil.copytree(book.root / "site" / "_static", target / "_static")  # pictures of the home page
    (target / "ledger.md").write_text(ledger.page(book.root, entries), encoding="utf-8")
    (target / "bibliography.md").write_text("# Bibliography\n\n```{bibliography}\n```\n", encoding="utf-8")
    home = (book.src / manifest.HOME_PAGE).read_text(encoding="utf-8")
    (target / manifest.HOME_PAGE).write_text("\n\n".join([home.rstrip(), *_toctrees(book)]) + "\n", encoding="utf-8")


def _toctrees(book: Book) -> list[str]:
    """One table of contents for each part; the generated pages close the appendices."""
    parts = [(part.title, [c.slug for c in part.chapters], part.chapters[0].number is not None) for part in book.parts]
    if parts[-1][2]:
        parts.append(("Appendices", [], False))
    parts[-1][1].extend(["ledger", "bibliography"])
    return [
        "\n".join(
            [
                "```{toctree}",
                f":caption: {title}",
                ":maxdepth: 1",
                *([":numbered: 2"] if numbered else []),
                "",
                *pages,
                "```",
            ]
        )
        for title, pages, numbered in parts
    ]


def _page(book: Book, chapter: Chapter, checks: tuple[ledger.Check, ...]) -> NotebookNode:
    """The notebook of a chapter as the site shows it: stubs in the tasks, targets before the checks."""
    note = ""
    if notebooks.is_fresh(book, chapter):
        page = nbformat.read(notebooks.published(book, chapter), as_version=4)
    elif chapter.device == "gpu":
        page = source.read(book, chapter)
        note = ":::{note}\nThis chapter needs a GPU and was built without one: its cells have no output.\n:::\n\n"
    else:
        raise SiteError(f"{chapter.slug} was not executed since it, or the code it stands on, changed: run `make book`")

    targets = {check.number: ledger.anchor(check) for check in checks if check.chapter == chapter}
    stubs = {exercise.label: exercise.stub for exercise in exercises.collect(chapter, page)[0]}
    cells, number = [], 0
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = _with_stubs(cell.source, stubs)
        elif cell.cell_type == "code":
            number += 1
            cell.source = SOLUTION_MARK.sub("", cell.source)
            if number in targets:
                cells.append(nbformat.v4.new_markdown_cell(f"({targets[number]})="))
        cells.append(cell)
    page.cells = cells
    heading = next(cell for cell in page.cells if cell.cell_type == "markdown")
    heading.source = heading.source.replace("\n", f"\n\n{note}{_requirements(book, chapter)}", 1)
    return page


def _requirements(book: Book, chapter: Chapter) -> str:
    if not chapter.requires:
        return ""
    return "*Builds on* " + ", ".join(f"{{doc}}`{slug}`" for slug in chapter.requires) + ".\n\n"


def _with_stubs(text: str, stubs: dict[str, str]) -> str:
    """Append to every task the code that a student starts from."""
    done, end = "", 0
    for gate in EXERCISE_END.finditer(text):
        label = source.LABEL.findall(text[end : gate.start()])[-1]
        done += f"{text[end : gate.start()]}```python\n{stubs[label].strip()}\n```\n"
        end = gate.start()
    return done + text[end:]


def build(book: Book) -> Path:
    """Build the site; a failed build leaves the last good one in place."""
    out = book.root / "out"
    staged, fresh, old, html = out / "site-src", out / "html.new", out / "html.old", out / "html"
    stage(book, staged)
    for folder in (fresh, old, out / "doctrees"):
        shutil.rmtree(folder, ignore_errors=True)  # Sphinx keeps pages that no longer exist
    options = [
        "-q",
        "-W",
        "--keep-going",
        "-n",
        "-b",
        "html",
        "-c",
        str(book.root / "site"),
        "-d",
        str(out / "doctrees"),
    ]
    if build_main([*options, str(staged), str(fresh)]) != 0:
        raise SiteError("Sphinx failed, see above")
    for chapter in book.chapters:
        if notebooks.is_fresh(book, chapter):  # offer the notebook itself for download, not its staged form
            shutil.copy(notebooks.published(book, chapter), fresh / "_sources" / f"{chapter.slug}.ipynb")
    if html.exists():
        html.rename(old)
    fresh.rename(html)
    shutil.rmtree(old, ignore_errors=True)
    return html / "index.html"


def main() -> int:
    try:
        book = manifest.load()
        index = build(book)
    except (manifest.ManifestError, source.ChapterError, SiteError) as error:
        print(f"{error}\nThe site was not built; the last good one, if any, is untouched.", file=sys.stderr)
        return 1
    for note in manifest.left_out(book):
        print(note)
    print(f"\nThe book:  {index}")
    print("To search it, serve it:  python3 -m http.server -d out/html 8000, then open http://localhost:8000")
    print("Executed notebooks:  out/notebooks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
