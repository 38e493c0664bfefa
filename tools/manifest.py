"""The one list of chapters: `book.toml`, read and checked.

Site, runner, ledger and tests learn about chapters here and nowhere else. Whatever is wrong with the list is one
`ManifestError` that names the file and the key.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

TIERS = ("core", "advanced", "appendix")
DEVICES = ("cpu", "gpu-optional", "gpu")
COURSE = ("exercises", "none")
HOME_PAGE = "index.md"

SLUG = re.compile(r"(?:(\d\d)-)?[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
FENCED = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^# +(.+?)\s*$", re.MULTILINE)


class ManifestError(ValueError):
    """Something in book.toml, or a chapter that does not match it."""


@dataclass(frozen=True)
class Chapter:
    slug: str
    title: str
    tier: str
    requires: tuple[str, ...]
    budget_s: int  # seconds the whole chapter should take on two quiet CPU cores; more is a warning
    timeout_s: int  # seconds after which one cell is stopped: it hangs
    grading_s: int  # seconds after which one cell of a student's answers is stopped
    device: str
    course: str  # "exercises", or "none" where they need the whole chapter, minutes of it, and are not handed out
    path: Path

    @property
    def number(self) -> int | None:
        """The number readers see: the NN of the slug, and none for an appendix."""
        prefix = SLUG.fullmatch(self.slug)[1]
        return int(prefix) if prefix else None

    @property
    def name(self) -> str:
        """Number and title, for a terminal: without the dollars around the mathematics of a title."""
        title = self.title.replace("$", "")
        return title if self.number is None else f"{self.number:02d} {title}"


@dataclass(frozen=True)
class Part:
    title: str
    chapters: tuple[Chapter, ...]


@dataclass(frozen=True)
class Book:
    title: str
    authors: tuple[str, ...]
    description: str
    language: str
    kernel: str
    root: Path
    src: Path
    parts: tuple[Part, ...]

    @property
    def chapters(self) -> tuple[Chapter, ...]:
        return tuple(chapter for part in self.parts for chapter in part.chapters)

    def find(self, name: str) -> Chapter:
        """The chapter with this number (2, 02) or slug; ManifestError, with those that there are, if there is none."""
        for chapter in self.chapters:
            if name == chapter.slug or (name.isdecimal() and int(name) == chapter.number):
                return chapter
        known = ", ".join(
            chapter.slug if chapter.number is None else f"{chapter.number:02d}" for chapter in self.chapters
        )
        raise ManifestError(f"There is no chapter {name!r}; there are {known}.")


class _Table:
    """A TOML table that knows its place in the file and refuses the keys nobody asked for."""

    def __init__(self, file: Path, name: str, values: Any) -> None:
        self.file, self.prefix = file, f"{name}." if name else ""
        if not isinstance(values, dict):
            raise ManifestError(f"{file}: {name}: expected a table, got {values!r}")
        self.values = dict(values)

    def error(self, key: str, message: str) -> ManifestError:
        return ManifestError(f"{self.file}: {self.prefix}{key}: {message}")

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        if key not in self.values:
            if default is None:
                raise self.error(key, "missing")
            return default
        value = self.values.pop(key)
        if type(value) is not kind:  # a bool is an int to isinstance
            raise self.error(key, f"expected {kind.__name__}, got {value!r}")
        return value

    def take_text(self, key: str) -> str:
        value = self.take(key, str)
        if not value.strip():
            raise self.error(key, "is empty")
        return value

    def take_texts(self, key: str, default: list[str] | None = None) -> tuple[str, ...]:
        values = self.take(key, list, default)
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, f"expected a list of strings, got {values!r}")
        return tuple(values)

    def take_choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.take(key, str, default)
        if value not in choices:
            raise self.error(key, f"expected one of {', '.join(choices)}, got {value!r}")
        return value

    def take_seconds(self, key: str, default: int | None = None) -> int:
        value = self.take(key, int, default)
        if value <= 0:
            raise self.error(key, f"expected a positive number of seconds, got {value}")
        return value

    def take_tables(self, key: str) -> list[_Table]:
        values = self.take(key, list)
        if not values:
            raise self.error(key, "is empty")
        return [_Table(self.file, f"{self.prefix}{key}[{i}]", value) for i, value in enumerate(values)]

    def close(self) -> None:
        for key in self.values:
            raise self.error(key, "unknown key")


def read(root: Path = ROOT) -> Book:
    """Read `root/book.toml` alone, so that one chapter can be run while its neighbours are still being written."""
    file = root / "book.toml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(f"{file}: missing file") from None
    try:
        top = _Table(file, "", tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(f"{file}: not TOML: {error}") from None

    book = _Table(file, "book", top.take("book", dict))
    defaults = _Table(file, "defaults", top.take("defaults", dict))
    parts = top.take_tables("part")
    top.close()

    title, description, language = (book.take_text(key) for key in ("title", "description", "language"))
    authors = book.take_texts("authors")
    src = root / book.take_text("src")
    book.close()

    budget_s, timeout_s, grading_s = (defaults.take_seconds(key) for key in ("budget_s", "timeout_s", "grading_s"))
    device, kernel = defaults.take_choice("device", DEVICES), defaults.take_text("kernel")
    defaults.close()

    earlier: list[Chapter] = []

    def chapter(table: _Table) -> Chapter:
        slug = table.take_text("slug")
        if not SLUG.fullmatch(slug):
            raise table.error("slug", f"expected NN-name or name in lower case with hyphens, got {slug!r}")
        if slug in {other.slug for other in earlier}:
            raise table.error("slug", f"duplicate {slug!r}")
        new = Chapter(
            slug=slug,
            title=table.take_text("title"),
            tier=table.take_choice("tier", TIERS),
            requires=table.take_texts("requires", []),
            budget_s=table.take_seconds("budget_s", budget_s),
            timeout_s=table.take_seconds("timeout_s", timeout_s),
            grading_s=table.take_seconds("grading_s", grading_s),
            device=table.take_choice("device", DEVICES, device),
            course=table.take_choice("course", COURSE, "exercises"),
            path=src / f"{slug}.md",
        )
        table.close()
        if (new.number is None) != (new.tier == "appendix"):
            raise table.error("slug", f"{slug!r}: a chapter starts with its number (NN-), an appendix does not")
        numbers = [other.number for other in earlier if other.number is not None]
        if new.number is not None and numbers and new.number <= numbers[-1]:
            raise table.error("slug", f"{slug!r} stands after chapter {numbers[-1]}: numbers must increase")
        for required in new.requires:
            if required not in {other.slug for other in earlier}:
                raise table.error("requires", f"{required!r} is no earlier chapter")
        earlier.append(new)
        return new

    def part(table: _Table) -> Part:
        new = Part(table.take_text("title"), tuple(chapter(entry) for entry in table.take_tables("chapter")))
        table.close()
        if len({entry.tier == "appendix" for entry in new.chapters}) > 1:
            raise table.error("chapter", "chapters and appendices stand in parts of their own")
        return new

    return Book(title, authors, description, language, kernel, root, src, tuple(part(table) for table in parts))


def first_heading(text: str) -> str | None:
    """The first `# heading` of a Markdown text; a comment in front matter or code is none."""
    match = HEADING.search(FENCED.sub("", FRONT_MATTER.sub("", text)))
    return match[1] if match else None


def load(root: Path = ROOT) -> Book:
    """Read `root/book.toml` and hold it against the chapters that exist."""
    book = read(root)
    file = root / "book.toml"
    for chapter in book.chapters:
        if not chapter.path.is_file():
            raise ManifestError(f"{file}: slug {chapter.slug!r}: missing file {chapter.path}")
        heading = first_heading(chapter.path.read_text(encoding="utf-8"))
        if heading != chapter.title:
            raise ManifestError(
                f"{file}: slug {chapter.slug!r}: title is {chapter.title!r}, but {chapter.path} starts with {heading!r}"
            )
    return book


def left_out(book: Book) -> list[str]:
    """A sentence for every text or notebook in the chapters' folder that the list does not name: it is not the book's,
    and does the book no harm, unless its author forgot to list it."""
    listed = {chapter.path for chapter in book.chapters} | {book.src / HOME_PAGE}
    found = {path for kind in ("*.md", "*.ipynb") for path in book.src.glob(kind)}
    return [
        f"{path.relative_to(book.root).as_posix()} is not listed in book.toml, and was left out"
        for path in sorted(found - listed)
    ]


def main(names: list[str]) -> int:
    """Print the files of the chapters named, or of all, for the Makefile."""
    try:
        book = load()
        chapters = [book.find(name) for name in names] or book.chapters
    except ManifestError as error:
        print(error, file=sys.stderr)
        return 1
    print(*(chapter.path.relative_to(ROOT).as_posix() for chapter in chapters), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
