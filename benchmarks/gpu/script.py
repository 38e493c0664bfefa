"""`python -m benchmarks gpu`: right, fast, good; each part a process with its own clock, each result a line of its own.

Without a GPU the same runs as a rehearsal, at toy sizes on the CPU, and says so: what it measures then means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.gpu import fast, good
from benchmarks.records import RESULTS, environment, rounded

__all__ = ["main"]

SECONDS = {"right": 90, "fast": 190, "good": 190}  # under eight minutes in all
OF_A_REHEARSAL = 1800  # a part takes half a minute; a busy machine is no reason to cut it off
Write = Callable[[dict[str, Any]], None]


def main(arguments: argparse.Namespace) -> int:
    """All parts, one after the other; or the one that this process is for."""
    if arguments.part is not None:
        PARTS[arguments.part](_writer(arguments.results, arguments.part), torch.cuda.is_available())
        return 0
    file: Path = arguments.results
    file.unlink(missing_ok=True)
    real = torch.cuda.is_available()
    if not real:
        print("No GPU here: a rehearsal at toy sizes on the CPU, whose numbers mean nothing. With a GPU this measures:")
        print(*(f"  {case.name}" for case in fast.CASES), f"  and {good.SAYS}", sep="\n", flush=True)
    _writer(file, "environment")({**environment(), "rehearsal": not real})
    for part in arguments.parts:
        began, seconds = time.perf_counter(), SECONDS[part] if real else OF_A_REHEARSAL
        command = [sys.executable, "-m", "benchmarks", "gpu", "--part", part, "--results", str(file)]
        try:
            status = subprocess.run(command, timeout=seconds, check=False).returncode
            ended = "finished" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {seconds} s"
        _writer(file, part)({"ended": ended, "seconds": time.perf_counter() - began})
    return 0


def _writer(file: Path, part: str) -> Write:
    """Appends a line to the results, and prints it, at once."""

    def write(record: dict[str, Any]) -> None:
        line = json.dumps({"part": part, **rounded(record)})
        with file.open("a", encoding="utf-8") as opened:
            opened.write(line + "\n")
        print(line if len(line) < 400 else line[:400] + " ...", flush=True)

    return write


def right(write: Write, real: bool) -> None:
    """The tests that need a GPU; in a rehearsal those of them that a CPU can run."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", f"--junitxml={report}"]
        if not real:  # a few of all kinds: test_golden and others have compared everything on the CPU
            command += ["-k", "default or low_rank"]
        subprocess.run(
            [*command, "tests/test_gpu.py"], check=False, env={**os.environ, "KFQN_REHEARSAL": "" if real else "1"},
            stdout=sys.stderr,
        )  # fmt: skip
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    write({"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped})


PARTS: dict[str, Callable[[Write, bool], None]] = {"right": right, "fast": fast.measure, "good": good.measure}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(function=main)
    parser.add_argument("--parts", nargs="+", choices=list(SECONDS), default=list(SECONDS))
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.jsonl", help="file of the results, written anew")
    parser.add_argument("--part", choices=list(SECONDS), help=argparse.SUPPRESS)
