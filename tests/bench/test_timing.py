"""What disturbs a clock, and what is done about it."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_kept_memory_comes_back_without_page_faults():
    """In a process of its own, as the setting cannot be undone: 8 tensors of 16 MiB are 32768 pages."""
    program = """
import resource, torch
from benchmarks.costs import keep_memory
keep_memory()
faults = []
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.zeros(2**22) for _ in range(8)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    first, second = map(int, output.split())
    assert first > 10**4
    assert second < first / 4
