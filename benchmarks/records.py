"""Results on disk: a file of JSON lines per problem, appended to as runs finish: an interrupted benchmark goes on.

A line is an environment (named by a digest), or a step cost, a run, a failure or the loss of a constant answer, which
refer to their environment.
Numbers have five significant digits. A run is identified by what determines it: method and its settings, learning
rate, seed and number of steps. Different problems may be run by different processes at the same time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import Method

__all__ = ["RESULTS", "Results", "environment", "rounded"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("kfqn-core", "torch", "numpy", "scipy", "scikit-learn", "pytorch_optimizer", "opt_einsum")


# How long a step of KFQN is, which its costs do not depend on: as many operations, with other numbers.
LENGTHS = frozenset({"row", "deep", "thin", "kept", "steady"})


def costly(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the settings of a method those that decide what a step costs."""
    return {key: value for key, value in settings.items() if key not in LENGTHS}


class Results:
    """The results of one problem in `folder`, read at once and appended to."""

    def __init__(self, problem: str, folder: Path = RESULTS):
        self.problem, self._file = problem, folder / f"{problem}.jsonl"
        self._lines = list(_read(self._file))

    def find(self, kind: str, **wanted: Any) -> list[dict[str, Any]]:
        """The records of a kind whose fields have these values, oldest first."""
        return [line for line in self._lines
                if line["kind"] == kind and all(line.get(key) == value for key, value in wanted.items())]  # fmt: skip

    def of(self, kind: str, method: Method, **wanted: Any) -> list[dict[str, Any]]:
        """The records of a method with the settings that it has now; of its cost, with those that cost the same."""
        if kind == "step cost":
            now = costly(method.described())
            return [line for line in self.find(kind, method=method.name, **wanted) if costly(line["settings"]) == now]
        return self.find(kind, method=method.name, settings=method.described(), **wanted)

    def add(self, kind: str, method: Method | None, **fields: Any) -> dict[str, Any]:
        """Append a record, of a method or of the problem itself; it is on disk when this returns."""
        here = environment()
        digest = hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:10]
        if not self.find("environment", id=digest):
            self._append({"kind": "environment", "id": digest, **here})
        record = rounded({
            "kind": kind, "problem": self.problem,
            **({} if method is None else {"method": method.name, "settings": method.described()}), **fields,
            "date": datetime.now(UTC).strftime("%Y-%m-%d"), "environment": digest,
        })  # fmt: skip
        self._append(record)
        return record

    def forget(self, method: Method) -> None:
        """Drop every record of a method, whatever its settings were."""
        self._lines = [line for line in self._lines if line.get("method") != method.name]
        part = self._file.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in self._lines), encoding="utf-8")
        part.replace(self._file)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(self._file)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(record)


def rounded(value: Any) -> Any:
    """`value` with every float at five significant digits; what is not finite becomes None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


@cache
def environment() -> dict[str, Any]:
    """Where a number was measured: versions, processor, threads, and the commit of this repository."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The commit of the code, with a mark where files that decide about results differ from it."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "kfqn_core", "benchmarks/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # an interrupted process may leave half a line at the end
            yield json.loads(line)


def _drop_unfinished_line(file: Path) -> None:
    if not file.exists():
        return
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])
