"""What disturbs a clock, and what is done about it."""

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytorch_optimizer", reason="benchmarks.costs needs it; `make setup` installs it")

from benchmarks.methods import METHODS
from benchmarks.timing import mean_interval, mixed, parts_of, update_share

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


def test_updates_become_rarer_along_a_run_and_its_share_of_them_smaller():
    kfqn = METHODS["kfqn"]
    assert update_share(kfqn, 10) == 1.0  # the interval grows by one every ten steps
    assert update_share(kfqn, 30) == 18 / 30
    assert update_share(kfqn, 400) < update_share(kfqn, 200)
    assert update_share(METHODS["kfqn-5"], 100) == 0.2
    assert mean_interval(kfqn, 30) == pytest.approx(30 / 18)


def test_a_method_pays_for_the_updates_of_a_run_as_long_as_it_gets():
    """An update costs 9 and another step 1, in Adam's: the mixture is that of N / r steps, which has more updates."""
    kfqn, turns = METHODS["kfqn"], np.ones(5)
    both = mixed(kfqn, [9 * turns, turns], turns, 400)
    steps = round(400 / both[0])
    share = update_share(kfqn, steps)
    assert both == pytest.approx(9 * share + 1 - share, rel=0.02)  # steps are whole
    assert share > 1.5 * update_share(kfqn, 400)
    assert mixed(METHODS["adam"], [turns], turns, 400) is turns
    assert list(parts_of(kfqn)) == ["kfqn, updating", "kfqn, coasting"]
