"""What disturbs a clock, and what is done about it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytorch_optimizer", reason="benchmarks.costs needs it; `make setup` installs it")

ROOT = Path(__file__).parents[2]


PROGRAM = """
import resource, sys, torch
from benchmarks.costs import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.zeros(2**22) for _ in range(8)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def second_time(whether):
    """Page faults of making and dropping 8 tensors of 16 MiB for the second time, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, whether]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_kept_memory_comes_back_without_page_faults():
    ordinary = second_time("return")
    if ordinary < 1000:
        pytest.skip(f"memory comes back with {ordinary} page faults anyway: large pages")
    assert second_time("keep") < ordinary / 4
