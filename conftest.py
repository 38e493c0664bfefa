"""Lets `pytest --nbmake chapters` run the chapters that book.toml lists, each under its own name.

Unit tests need neither nbmake nor anything else of the book: with pytest and torch alone those run that can.
"""

from __future__ import annotations

import os

import pytest

# Two threads per worker on two busy cores wait for each other: a factor of a hundred has been measured.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What `make setup` brings along for the book, its benchmarks and its tests, by the name of the import.
OPTIONAL = {
    *("hypothesis", "yaml", "importlinter"),
    *("sklearn", "scipy", "pandas", "matplotlib", "cycler", "tqdm", "IPython", "pytorch_optimizer", "opt_einsum"),
    *("jupytext", "nbformat", "nbclient", "nbconvert", "nbgrader", "nbmake", "sphinx", "docutils"),
    *("traitlets", "websocket", "jinja2", "markupsafe", "pygments", "bs4", "pypdf"),
    *("pybtex", "sqlalchemy"),
}


def pytest_addoption(parser):
    group = parser.getgroup("the book")
    group.addoption(
        "--reuse",
        action="store_true",
        help="with --nbmake: execute a chapter only if it, or anything it stands on, changed since it last passed",
    )
    group.addoption(
        "--strict-budgets",
        action="store_true",
        help="with --nbmake: a chapter over its budget_s fails instead of warning; for a quiet machine",
    )


def runs_chapters(config) -> bool:
    return config.getoption("nbmake", default=False)


class Module(pytest.Module):
    """A test file; one whose imports are not installed here is skipped with a sentence."""

    def collect(self):
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            missing = (isinstance(cause, ModuleNotFoundError) and cause.name) or ""
            if missing.partition(".")[0] in OPTIONAL:
                pytest.skip(f"{self.path.name} needs {missing}, which is not installed here: `make setup` installs it")
            raise


def pytest_pycollect_makemodule(module_path, parent):
    return Module.from_parent(parent, path=module_path)


def pytest_ignore_collect(collection_path, config):
    # nbmake itself would run every .ipynb that it meets: somebody's notes, or the copies in out/.
    return True if runs_chapters(config) and collection_path.suffix == ".ipynb" else None


def pytest_collect_file(file_path, parent):
    if not runs_chapters(parent.config) or file_path.suffix != ".md":
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
    if runs_chapters(config):
        # Each of two workers is handed half of the list: both begin with their longest chapter.
        items.sort(key=lambda item: -getattr(item, "budget_s", 0))
        items[:] = items[::2] + items[1::2]


def pytest_report_teststatus(report):
    if report.when != "call" or not report.passed:
        return None
    said = dict(report.user_properties)
    if "chapter" in said:
        return "passed", ".", (said["chapter"], {"yellow" if "over budget" in said else "green": True})
    return None


def pytest_terminal_summary(terminalreporter, config):
    if not runs_chapters(config):
        return
    from tools import manifest

    said = [dict(report.user_properties) for report in terminalreporter.stats.get("passed", [])]
    notes = [properties["over budget"] for properties in said if "over budget" in properties]
    try:
        notes += manifest.left_out(manifest.read(config.rootpath))
    except manifest.ManifestError:
        return  # pytest has stopped with it
    if notes:
        terminalreporter.section("the book: warnings", yellow=True)
        for note in notes:
            terminalreporter.line(note)
