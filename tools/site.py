"""Executed notebooks into the site: stage the pages in `out/site-src`, build, and swap the result into `out/html`.

python -m tools.site                 the whole site; refuses chapters that were not executed
python -m tools.site --after-failure where there is no whole site yet, one that says which chapters failed
python -m tools.site --only 02       out/chapter, whatever else was executed or not
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sphinx.cmd.build import build_main

from tools import exercises, gaps, ledger, manifest, notebooks, source, tidy, toggles
from tools.manifest import Book, Chapter

EXERCISE_END = re.compile(r"^:{3,}\{exercise-end\}", re.MULTILINE)
INCOMPLETE = ".incomplete"  # lies in a site whose chapters have not all been executed
SOLUTION_MARK = re.compile(r"^[ \t]*### (?:BEGIN|END) SOLUTION[ \t]*\n?", re.MULTILINE)


class SiteError(Exception):
    """The site cannot be built from what is there."""


def stage(book: Book, target: Path, with_gaps: bool = False, only: Chapter | None = None) -> None:
    """Write everything Sphinx reads into `target`, made anew; `with_gaps` shows chapters that have no results too."""
    entries = ledger.collect(book)
    if entries.problems:
        raise SiteError("the ledger has gaps:\n" + "\n".join(entries.problems))
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for chapter in book.chapters:
        page, note = _notebook(book, chapter, with_gaps)
        if chapter == only:
            note += gaps.among(book, chapter)
        nbformat.write(_page(chapter, page, note, entries.checks), target / f"{chapter.slug}.ipynb")
    shutil.copytree(book.root / "site" / "_static", target / "_static")  # pictures of the home page
    for page in _own_pages(book):
        shutil.copy(page, target)
    (target / "ledger.md").write_text(ledger.page(book.root, entries), encoding="utf-8")
    (target / "bibliography.md").write_text("# Bibliography\n\n```{bibliography}\n```\n", encoding="utf-8")
    home = (book.src / manifest.HOME_PAGE).read_text(encoding="utf-8")
    (target / manifest.HOME_PAGE).write_text("\n\n".join([home.rstrip(), *_toctrees(book)]) + "\n", encoding="utf-8")


def _own_pages(book: Book) -> list[Path]:
    """Pages that are neither chapters nor generated: how to use the optimizer, its reference."""
    return sorted((book.root / "site" / "pages").glob("*.md"), reverse=True)


def _toctrees(book: Book) -> list[str]:
    """One table of contents for each part; the generated pages close the appendices."""
    parts = [(part.title, [c.slug for c in part.chapters], part.chapters[0].number is not None) for part in book.parts]
    if parts[-1][2]:
        parts.append(("Appendices", [], False))
    parts[-1][1].extend(["ledger", "bibliography"])
    if own := [page.stem for page in _own_pages(book)]:
        parts.insert(len(parts) - 1, ("The optimizer", own, False))
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


def _notebook(book: Book, chapter: Chapter, with_gaps: bool) -> tuple[NotebookNode, str]:
    """A chapter's notebook with its results, and what has to be said at its top."""
    if notebooks.is_fresh(book, chapter):
        return nbformat.read(notebooks.published(book, chapter), as_version=4), ""
    if with_gaps or chapter.device == "gpu":
        return gaps.page(book, chapter), gaps.note(book, chapter)
    raise SiteError(f"{chapter.slug} was not executed since it, or the code it stands on, changed: run `make book`")


def _page(chapter: Chapter, page: NotebookNode, note: str, checks: tuple[ledger.Check, ...]) -> NotebookNode:
    """The notebook of a chapter as the site shows it: stubs in the tasks, targets before the checks."""
    targets = {check.number: ledger.anchor(check) for check in checks if check.chapter == chapter}
    tasks = {exercise.label: exercise for exercise in exercises.collect(chapter, page)[0]}
    toggles.name(chapter, page, {f"{label}-check": exercise.title for label, exercise in tasks.items()})
    cells, number = [], 0
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = _with_stubs(cell.source, tasks)
        elif cell.cell_type == "code":
            number += 1
            cell.source = exercises.visible(SOLUTION_MARK.sub("", cell.source))
            if number in targets:
                cells.append(nbformat.v4.new_markdown_cell(f"({targets[number]})="))
        cells.append(cell)
    page.cells = cells
    heading = next(cell for cell in page.cells if cell.cell_type == "markdown")
    title, _, text = heading.source.partition("\n")
    heading.source = f"{title}\n\n{note}{_requirements(chapter)}{text}"
    return page


def _requirements(chapter: Chapter) -> str:
    if not chapter.requires:
        return ""
    return "*Builds on* " + ", ".join(f"{{doc}}`{slug}`" for slug in chapter.requires) + ".\n\n"


def _with_stubs(text: str, tasks: dict[str, exercises.Exercise]) -> str:
    """Append to every task what it is worth, and the code that a student starts from."""
    done, end = "", 0
    for gate in EXERCISE_END.finditer(text):
        label = source.LABEL.findall(text[end : gate.start()])[-1]
        task = tasks[label]
        done += f"{text[end : gate.start()]}\n*{task.facts}*\n\n```python\n{task.stub.strip()}\n```\n"
        end = gate.start()
    return done + text[end:]


def build(book: Book, with_gaps: bool = False, only: Chapter | None = None) -> Path:
    """Build the site; a failed build leaves the last good one in place."""
    out = book.root / "out"
    html = out / ("chapter" if only else "html")
    staged, fresh, old = out / "site-src", out / f"{html.name}.new", out / f"{html.name}.old"
    stage(book, staged, with_gaps, only)
    for folder in (fresh, old, out / "doctrees"):
        shutil.rmtree(folder, ignore_errors=True)  # Sphinx keeps pages that no longer exist
    options = ["-q", "-W", "--keep-going", "-n", "-b", "html"]
    places = ["-c", str(book.root / "site"), "-d", str(out / "doctrees"), str(staged), str(fresh)]
    if build_main([*options, *places]) != 0:
        raise SiteError("Sphinx failed, see above")
    tidy.tidy_folder(fresh)
    for chapter in book.chapters:
        if notebooks.is_fresh(book, chapter):  # offer the notebook itself for download, not its staged form
            shutil.copy(notebooks.published(book, chapter), fresh / "_sources" / f"{chapter.slug}.ipynb")
    if with_gaps:
        (fresh / INCOMPLETE).touch()
    if html.exists():
        html.rename(old)
    fresh.rename(html)
    shutil.rmtree(old, ignore_errors=True)
    return html / (f"{only.slug}.html" if only else "index.html")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.site", description="Build the site.")
    parser.add_argument("--only", metavar="NN", help="one chapter, to out/chapter")
    parser.add_argument("--after-failure", action="store_true", help="mark what failed, unless a whole site is there")
    asked = parser.parse_args(arguments)
    try:
        book = manifest.load()
        only = book.find(asked.only) if asked.only else None
        html = book.root / "out" / "html"
        if asked.after_failure and html.exists() and not (html / INCOMPLETE).exists():
            print(f"The last good notebooks and site are untouched:  {(html / 'index.html').as_uri()}")
            return 0
        index = build(book, with_gaps=asked.after_failure or only is not None, only=only)
    except (manifest.ManifestError, source.ChapterError, SiteError) as error:
        print(f"{error}\nThe site was not built; the last good one, if any, is untouched.", file=sys.stderr)
        return 1
    for note in manifest.left_out(book):
        print(note)
    if only:
        print(f"\nThe page:  {index.as_uri()}\nAll chapters:  make book")
        return 0
    if asked.after_failure:
        for chapter in book.chapters:
            if not notebooks.is_fresh(book, chapter):
                print(f"{chapter.name}: {notebooks.failure(book, chapter) or 'not executed'}")
        print("The site has these pages without results, and says so on each.")
    print(f"\nThe book:  {index.as_uri()}\nTo search it:  make serve\nExecuted notebooks:  out/notebooks")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
