"""What other machines do with the repository is what a reader types, and the files that say so are complete."""

import json
import re
import tomllib
from functools import cache

import pytest
import yaml

from tools.manifest import ROOT


@cache
def targets():
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def made(text):
    """Targets in commands: at the start of a line or of a piece of code, not in prose."""
    return set(re.findall(r"(?:^|`|\")make ([a-z-]+)", text, re.MULTILINE))


def test_the_workflow_runs_what_a_reader_runs():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text(encoding="utf-8"))
    runs = [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    assert all(re.fullmatch(r"make [a-z]+", run) for run in runs)
    assert {"lint", "test", "book", "pages"} <= made("\n".join(runs)) <= targets()
    (artifact,) = (step for step in flow["jobs"]["test"]["steps"] if "upload-pages" in step.get("uses", ""))
    assert artifact["with"]["path"] == "out/html"
    (python,) = (step for step in flow["jobs"]["test"]["steps"] if "setup-python" in step.get("uses", ""))
    assert python["with"]["python-version"] == "3.12"


def test_the_container_and_the_hooks_run_targets_that_exist():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert made(container["postCreateCommand"]) == {"setup"}
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in hooks["repos"] for hook in repo["hooks"]]
    assert entries == ["make lint"]
    assert {"setup", "lint"} <= targets()


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "chapters/index.md", ".devcontainer/devcontainer.json"]
)
def test_every_command_that_is_named_exists(file):
    assert made((ROOT / file).read_text(encoding="utf-8")) <= targets()


def test_the_citation_names_what_the_package_is():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == citation["version"]
    assert project["authors"] == citation["authors"]
    assert {"cff-version", "title", "message", "authors", "license", "abstract", "references"} <= citation.keys()
    for work in citation["references"]:
        assert {"type", "title", "authors", "year"} <= work.keys()
