"""A chapter as a pytest item; `conftest.py` hands chapters over."""

from __future__ import annotations

import sys

import pytest
from nbmake.pytest_items import NbMakeFailureRepr

from tools import notebooks
from tools.source import ChapterError

HARD_STOP = 20  # a chapter that takes this many budgets hangs: a busy or slow machine is not twenty times slower


class ChapterFile(pytest.File):
    def __init__(self, *, book, chapter, **kwargs):
        super().__init__(**kwargs)
        self.book, self.chapter = book, chapter

    def collect(self):
        yield ChapterItem.from_parent(self, name=self.chapter.title.replace("$", ""), budget_s=self.chapter.budget_s)


class ChapterItem(pytest.Item):
    def __init__(self, *, budget_s, **kwargs):
        super().__init__(**kwargs)
        self.budget_s = budget_s
        self.add_marker(pytest.mark.timeout(HARD_STOP * budget_s))

    def runtest(self):
        book, chapter = self.parent.book, self.parent.chapter
        if chapter.device == "gpu" and not gpu_is_available():
            pytest.skip("this chapter needs a GPU, and there is none here")
        if self.config.getoption("reuse") and notebooks.is_fresh(book, chapter):
            self.user_properties.append(("chapter", "REUSED"))
            return
        timing = notebooks.execute(book, chapter, self.say)
        spent = f"took {timing.reading_s:.1f} s, budget {self.budget_s} s"
        self.user_properties.append(("chapter", f"PASSED ({spent}; checks tried in {timing.verifying_s:.1f} s)"))
        if timing.reading_s > self.budget_s:
            # Seconds on a wall clock judge the machine and what else it does as much as the chapter.
            over = f"{chapter.slug}: {spent}: if this machine is quiet, make it smaller, or raise budget_s in book.toml"
            if self.config.getoption("strict_budgets"):
                raise ChapterError(over)
            self.user_properties.append(("over budget", over))

    def say(self, line: str) -> None:
        """To the terminal at once, past pytest's capture; on the channel of errors, which a worker shares with it."""
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(line, file=sys.stderr, flush=True)

    def repr_failure(self, excinfo, style=None):
        error, chapter = excinfo.value, self.parent.chapter
        if isinstance(error, ChapterError):
            return NbMakeFailureRepr(f"{error}\n{error.trace}".strip(), str(error))
        if isinstance(error, pytest.fail.Exception):  # from pytest-timeout
            message = f"{chapter.slug}: stopped after {HARD_STOP} times its budget of {self.budget_s} s"
            return NbMakeFailureRepr(message, message)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, 0, self.name


def gpu_is_available() -> bool:
    import torch  # only where a chapter asks: it takes a second

    return torch.cuda.is_available()
