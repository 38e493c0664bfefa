"""Break the code on purpose and see the named test turn red.

Each break is a bug that public code has had. It is made in a copy of the package, and the guarding tests run on that
copy in a fresh interpreter; every one of them must fail.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="some of its guards are property tests; `make setup` installs hypothesis")

ROOT = Path(__file__).resolve().parents[1]
PARITY = "tests/test_optimizer.py::test_kbfgs_is_the_2020_method"
CNN_PARITY = "tests/test_optimizer_cnn.py::test_convolutional_presets_are_the_reconstructed_method"
RANKS = "tests/test_ddp.py::test_two_ranks_with_half_batches_are_one_with_the_whole"
NO_TRACE = "tests/test_optimizer.py::test_evaluation_and_copies_leave_no_trace"


@dataclass(frozen=True)
class Break:
    """Replace every `old` by `new` in `file`; `guards` must turn red."""

    name: str
    file: str
    old: str
    new: str
    guards: tuple[str, ...]


BREAKS = [
    Break(
        "Powell's correction with the wrong sign",
        "kfqn_core/maths/damping.py",
        "theta * vector + (1 - theta) * safe",
        "theta * vector - (1 - theta) * safe",
        ("tests/test_damping.py::test_powell_sign_leaves_positive_curvature", f"{PARITY}[None-robust_loss]"),
    ),
    Break(
        "the dense inverse update never lands",
        "kfqn_core/estimate/inverses.py",
        "bfgs_inverse_update_([pair.inverse.dense() for",
        "bfgs_inverse_update_([pair.inverse.dense().clone() for",
        (f"{PARITY}[None-square_loss]",),
    ),
    Break(
        "the update returns its argument",
        "kfqn_core/maths/secant.py",
        "return H + (half + half.mT)",
        "return H",
        ("tests/test_secant.py::test_update_moves_the_estimate_and_leaves_its_input",),
    ),
    Break(
        "the factor m dropped: gradients of the mean loss taken for per-sample gradients",
        "kfqn_core/estimate/hooks.py",
        "g_sum = view.sum_output(grad)",
        "g_sum = view.sum_output(grad) / use.samples",
        (f"{PARITY}[None-square_loss]", f"{PARITY}[5-square_loss]"),
    ),
    Break(
        "the bias column lost from A",
        "kfqn_core/layers.py",
        "A[:, -1] = A[:, :, -1] = self.locations(x) * self.mean_input(x)",
        "A[:, -1] = A[:, :, -1] = 0.0",
        ("tests/test_layers.py::test_statistics_are_those_of_the_patches", f"{PARITY}[None-square_loss]"),
    ),
    Break(
        "the averaged pair stored after damping",
        "kfqn_core/estimate/inverses.py",
        "    blocks = (row_blocks",
        "    for f, *b in zip(factors, row_blocks(s, shapes), row_blocks(y, shapes)): f.s_mean.copy_(b[0]), "
        "f.y_mean.copy_(b[1])\n    blocks = (row_blocks",
        (f"{PARITY}[None-robust_loss]", f"{PARITY}[5-robust_loss]"),
    ),
    Break(
        "A of the start divided by T^2, while its action is not",
        "kfqn_core/estimate/hooks.py",
        "self._sum_over_uses(self.view.second_moment)",
        "self._sum_over_uses(self.view.second_moment) / self.T**2",
        (f"{CNN_PARITY}[KFQN_2022-grouped]",),
    ),
    Break(
        "gradients summed over locations, pre-activations averaged",
        "kfqn_core/estimate/hooks.py",
        "_total([_known(use.g_sum) for use in self._uses()]) / self.T",
        "_total([_known(use.g_sum) for use in self._uses()])",
        (f"{CNN_PARITY}[KFQN_2022-grouped]",),
    ),
    Break(
        "stale hooks: a copy of the model writes into the original's records",
        "kfqn_core/estimate/hooks.py",
        "if capture is None or module is not self.module() or not capture._fires(module):",
        "if capture is None or not capture._fires(module):",
        (NO_TRACE,),
    ),
    Break(
        "stale hooks: a pickled model and its optimizer come back without a link between them",
        "kfqn_core/estimate/hooks.py",
        "hook.capture, hook.module = weakref.ref(self), weakref.ref(module)",
        "pass",
        ("tests/test_hooks.py::test_model_and_optimizer_copied_together_go_on_bitwise[default-pickle-3]",),
    ),
    Break(
        "every rank keeps its own curvature",
        "kfqn_core/parallel/ranks.py",
        "return total / self._wrapper.process_group.size()",
        "return value",
        (f"{RANKS}[vectors-default]", f"{RANKS}[images-KFQN_2022]"),
    ),
    Break(
        "hooks fire in evaluation",
        "kfqn_core/estimate/hooks.py",
        "self.watching and module.training and torch.is_grad_enabled()",
        "self.watching and torch.is_grad_enabled()",
        (NO_TRACE,),
    ),
    Break(
        "dropout redrawn in the second pass",
        "kfqn_core/training/second_pass.py",
        "torch.set_rng_state(self._cpu_state)",
        "pass",
        ("tests/test_optimizer.py::test_second_pass_sees_the_same_dropout_mask_and_leaves_no_trace",),
    ),
    Break(
        "batch-norm statistics moved twice",
        "kfqn_core/training/second_pass.py",
        "buffer.copy_(value)",
        "pass",
        ("tests/test_optimizer.py::test_second_pass_sees_the_same_dropout_mask_and_leaves_no_trace",),
    ),
]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_deliberate_break_turns_its_tests_red(broken, tmp_path):
    for folder in ("kfqn_core", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "book"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / broken.file
    source = file.read_text()
    assert broken.old in source, f"{broken.file} no longer holds {broken.old!r}: update this break"
    file.write_text(source.replace(broken.old, broken.new))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=line",
        *broken.guards,
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    failed = set(re.findall(r"^FAILED (\S+)", result.stdout, flags=re.MULTILINE))
    green = [guard for guard in broken.guards if not any(node.startswith(guard) for node in failed)]
    assert result.returncode == 1, result.stdout + result.stderr
    assert not green, f"{green} did not notice: {broken.name}\n{result.stdout}"
