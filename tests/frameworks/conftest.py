"""The frameworks' tests print their figures once, at the end."""

from __future__ import annotations

import pytest

LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request):
    """Print a line at the end of the run, whether the test passes or not."""
    return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash.get(LINES, [])
    if lines:
        terminalreporter.section("figures", sep="-")
        for text in lines:
            terminalreporter.write_line(text)
