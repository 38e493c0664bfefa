"""The example of README, as it is started there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

ROOT = Path(__file__).parent.parent


def losses(ranks, epochs=2):
    """What the example prints, run by so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    report = subprocess.run(
        [*command, "examples/autoencoder_ddp.py", str(epochs)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    return [float(loss) for loss in re.findall(r"loss on test images ([\d.]+)", report.stdout)]


def test_two_processes_train_an_autoencoder_as_one_does():
    two = losses(2)
    assert len(two) == 2  # one rank speaks
    assert two[1] < two[0] < 0.9 * 44.36  # of 64 pixels at probability one half
    assert two == pytest.approx(losses(1), abs=1e-3)  # of float32 1e-5; ranks that do not share differ by 1e-2
