"""environment.yml gives conda users what pyproject.toml gives pip users."""

import tomllib

import pytest
import yaml

from tools.manifest import ROOT

CONDA_NAMES = {"torch": "pytorch"}


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def environment():
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def split(requirement):
    name, _, version = requirement.partition(">=")
    return name, version


def requirements(pyproject):
    """Package -> lowest version, over the optimizer and every extra."""
    groups = [pyproject["dependencies"], *pyproject["optional-dependencies"].values()]
    return dict(split(entry) for group in groups for entry in group if not entry.startswith("kfqn-core["))


def test_same_packages_and_versions(pyproject, environment):
    asked = {CONDA_NAMES.get(name, name): version for name, version in requirements(pyproject).items()}
    asked["python"] = split(pyproject["requires-python"])[1]

    (from_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    offered = [entry for entry in environment["dependencies"] if isinstance(entry, str) and entry != "pip"]
    offered += [entry for entry in from_pip if entry != "--editable ."]
    assert dict(map(split, offered)) == asked


def test_environment_installs_the_package_itself(environment):
    assert environment["channels"] == ["conda-forge"]
    assert "--editable ." in environment["dependencies"][-1]["pip"]


def test_every_requirement_is_pinned_for_the_book(pyproject):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert not requirements(pyproject).keys() - pinned
    assert not any("+" in line or "@" in line for line in lines), "a local version or path that no index holds"
