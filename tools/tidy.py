"""What the extensions write into pages and a screen reader stumbles over, put right in the finished HTML."""

from __future__ import annotations

import re
from pathlib import Path

# What is there, and what belongs there.
REPAIRS = (
    # Every toggle would be announced alike, instead of by the words on it.
    (re.compile(r'(<summary[^>]*) aria-label="Toggle hidden content"'), r"\1"),
    (re.compile(r'(<button class="btn search-button-field[^>]*) aria-label="Search"'), r"\1"),
    # One name on many boxes of a page is no name.
    (re.compile(r'(<(?:section|div)(?: class="[^"]*")?) id="(?:proof|(?:proof|exercise|solution)-content)"'), r"\1"),
    # A list whose children are no items; the role of an entry is deprecated.
    (re.compile(r'(<div[^>]*) role="(?:list|doc-biblioentry)"'), r"\1"),
    # The corner of a table heads nothing.
    (re.compile(r"<th(?: class=\"[^\"]*\")?>(?:&nbsp;)?\s*(?:<p>\s*</p>)?\s*</th>"), "<td></td>"),
    # The column with the book's name and its list of chapters lay outside every landmark.
    (re.compile(r'<div id="pst-primary-sidebar"'), '<div role="region" aria-label="The book" id="pst-primary-sidebar"'),
)


def tidy(html: str) -> str:
    """The page with every repair made."""
    for there, belongs in REPAIRS:
        html = there.sub(belongs, html)
    return html


def tidy_folder(folder: Path) -> None:
    """Repair every page in place."""
    for page in folder.rglob("*.html"):
        page.write_text(tidy(page.read_text(encoding="utf-8")), encoding="utf-8")
