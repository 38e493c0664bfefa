"""Lets `pytest --nbmake chapters` run the chapters that book.toml lists, each under its own name."""

from __future__ import annotations

import os

import pytest

# Two threads per worker on two busy cores wait for each other: a factor of a hundred has been measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--reuse",
        action="store_true",
        help="with --nbmake: execute a chapter only if it, or the code it stands on, changed since it last passed",
    )


def pytest_collect_file(file_path, parent):
    if not parent.config.getoption("nbmake") or file_path.suffix != ".md":
        return None
    from tools import collector, manifest  # imports Jupyter: unit tests need not wait for it

    try:
        book = manifest.read(parent.config.rootpath)
    except manifest.ManifestError as error:
        raise pytest.UsageError(str(error)) from None
    for chapter in book.chapters:
        if file_path == chapter.path:
            return collector.ChapterFile.from_parent(parent, path=file_path, book=book, chapter=chapter)
    return None


def pytest_collection_modifyitems(config, items):
    if config.getoption("nbmake"):
        # Each of two workers is handed half of the list: both begin with their longest chapter.
        items.sort(key=lambda item: -getattr(item, "budget_s", 0))
        items[:] = items[::2] + items[1::2]


def pytest_report_teststatus(report):
    if report.when != "call" or not report.passed:
        return None
    word = dict(report.user_properties).get("chapter")
    if word:
        return "passed", ".", (word, {"green": True})
    return None
