"""environment.yml gives conda users what pyproject.toml gives pip users; the pins install where the book says so."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from importlib import metadata

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

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


@pytest.fixture(scope="module")
def pins():
    """Package -> version, as constraints.txt pins it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "a local version or path that no index holds"
    found = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def test_every_requirement_is_pinned_for_the_book(pyproject, pins):
    assert not requirements(pyproject).keys() - pins


@pytest.fixture(scope="module")
def promised(pyproject):
    """The Python versions that have to work: the very first one promised, and the first of every later 3.x."""
    first = split(pyproject["requires-python"])[1]
    assert re.fullmatch(r"3\.\d+", first)
    return [f"3.{minor}.0" for minor in range(int(first[2:]), 14)]


def excluded(pins, promised, python_of):
    """Every pin that refuses a promised Python, with its reason."""
    return [
        f"{name}=={version} asks for Python {python_of[name]}, and {python} is promised"
        for name, version in pins.items()
        for python in promised
        if name in python_of and python not in SpecifierSet(python_of[name])
    ]


@pytest.fixture(scope="module")
def pinned_here(pins):
    """What is installed here in its pinned version."""
    found = {}
    for name, version in pins.items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if distribution.version.partition("+")[0] == version:
            found[name] = distribution
    if len(found) < 0.95 * len(pins):
        pytest.skip(f"only {len(found)} of {len(pins)} pins are what is installed here: `make setup` installs them")
    return found


def test_every_pin_installs_on_every_promised_python(pins, promised, pinned_here):
    """pip says nothing about a pin that refuses this Python: it tries everything else, gigabytes of it, for ever."""
    assert promised[0] == "3.11.0"
    python_of = {name: distribution.metadata.get("Requires-Python", "") for name, distribution in pinned_here.items()}
    assert sum(bool(text) for text in python_of.values()) > 100
    assert not excluded(pins, promised, python_of)
    # What was once pinned: Debian 12 has Python 3.11.2.
    assert excluded({"soupsieve": "4.1.2"}, ["3.11.0", "3.12.0"], {"soupsieve": ">=3.11.5"}) == [
        "soupsieve==4.1.2 asks for Python >=3.11.5, and 3.11.0 is promised"
    ]
    assert excluded({"six": "1"}, promised, {"six": ">=2.7,<3.13"})


def test_the_pins_need_nothing_that_is_not_pinned_or_pinned_otherwise(pins, promised, pinned_here):
    """On a promised Python that is not this one a package may ask for more."""
    wrong = []
    for python in promised:
        there = {"python_full_version": python, "python_version": python.removesuffix(".0"), "extra": ""}
        environment = default_environment() | there
        for name, distribution in pinned_here.items():
            for requirement in map(Requirement, distribution.requires or []):
                if requirement.marker is not None and not requirement.marker.evaluate(environment):
                    continue
                needed = canonicalize_name(requirement.name)
                if needed in ("setuptools", "wheel"):
                    continue  # tools of the environment, as pip is: `pip freeze` leaves them out
                if needed not in pins:
                    wrong.append(f"on {python} {name} needs {requirement}, which is not pinned")
                elif not requirement.specifier.contains(pins[needed], prereleases=True):
                    wrong.append(f"on {python} {name} needs {requirement}, pinned is {pins[needed]}")
    assert not wrong, wrong


def test_a_wheel_holds_every_floor_and_file():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = sorted((ROOT / "kfqn_core").rglob("*"))
    files = [path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts]
    folders = {path.parent for path in files}
    assert len(folders) > 5
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder}: no __init__.py"
        assert any(fnmatchcase(".".join(folder.parts), pattern) for pattern in tool["packages"]["find"]["include"])
    data = {path.as_posix() for path in files if path.suffix != ".py"}
    assert data == {f"kfqn_core/{name}" for name in tool["package-data"]["kfqn_core"]}


def test_setup_shows_what_it_does():
    """Minutes of silence look like a machine that hangs."""
    (install,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert "--constraint constraints.txt" in install
    assert not {"-q", "--quiet"} & set(install.split())
    assert not install.lstrip().startswith("@")


@pytest.mark.parametrize(
    ("choice", "index"),
    [("cpu", "--extra-index-url https://download.pytorch.org/whl/cpu"), ("cuda", None),
     ("cu126", "--extra-index-url https://download.pytorch.org/whl/cu126")],
)  # fmt: skip
def test_the_build_of_torch_is_the_readers_choice(tmp_path, choice, index):
    """Only torch is asked of PyTorch's index: where it cannot be reached, nothing else waits for it."""
    (tmp_path / "tools").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tools/jupyterlab-overrides.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = ["make", "--dry-run", "setup", f"TORCH={choice}", f"PYTHON={sys.executable}"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    torch, rest = re.findall(r"pip install [^&|]+", report.stdout)
    assert "--no-deps torch" in torch
    assert (index in torch) if index else ("index-url" not in torch)
    assert "--editable '.[dev]'" in rest
    assert "index-url" not in rest
