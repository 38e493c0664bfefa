"""tools.browser without a browser: what is started is ended."""

import subprocess
import tempfile

import pytest

from tools import browser

# Says where it listens, as Chromium does, and does not listen.
DEAF = """#!/bin/sh
for word; do
  case $word in --user-data-dir=*) printf '1\\n/devtools\\n' > "${word#*=}/DevToolsActivePort";; esac
done
exec sleep 60
"""


def test_a_browser_that_cannot_be_spoken_to_leaves_no_process_and_no_folder(tmp_path, monkeypatch):
    fake, place, started = tmp_path / "chromium", tmp_path / "temporary", []
    fake.write_text(DEAF)
    fake.chmod(0o755)
    place.mkdir()
    start = subprocess.Popen

    def noted(*args, **more):
        started.append(start(*args, **more))
        return started[-1]

    monkeypatch.setattr(browser, "find", lambda: str(fake))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(subprocess, "Popen", noted)
    with pytest.raises(OSError, match="refused"):
        browser.Browser()
    assert started[0].poll() is not None
    assert list(place.iterdir()) == []
