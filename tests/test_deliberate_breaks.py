"""Break the code on purpose and see the named test turn red.

Each break is a bug that public code has had, or one that this package could. The guarding tests run in a fresh
interpreter in which the named object was replaced before they were collected; every one of them must fail.
"""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="some of its guards are property tests; `make setup` installs hypothesis")

ROOT = Path(__file__).resolve().parents[1]
PARITY = "tests/test_optimizer.py::test_kbfgs_is_the_2020_method"
CNN_PARITY = "tests/test_optimizer_cnn.py::test_convolutional_presets_are_the_reconstructed_method"
RANKS = "tests/test_ddp.py::test_ranks_with_parts_of_batches_are_one_with_the_whole"
NO_TRACE = "tests/test_optimizer.py::test_evaluation_and_copies_leave_no_trace"
MASK = "tests/test_optimizer.py::test_second_pass_sees_the_same_dropout_mask_and_leaves_no_trace"
CLEARED = "tests/test_uses.py::test_what_is_not_in_the_gradient_does_not_count[before-zeroed_in_place-None]"
MOVES = "tests/test_moves.py::test_a_step_of_many_layers_is_the_plain_step_of_each"


@dataclass(frozen=True)
class Break:
    """Each of `places`, by its dotted name, becomes the `broken` of its code (`tests.breaking`); `guards` turn red."""

    name: str
    places: dict[str, str]
    guards: tuple[str, ...]


BREAKS = [
    Break(
        "Powell's correction with the wrong sign",
        {
            "kfqn_core.maths.damping._interpolate": """
            def broken(vector, safe, product, safe_product, mu):
                theta = (1 - mu) * safe_product / (safe_product - product)
                return torch.where(product < mu * safe_product, theta * vector - (1 - theta) * safe, vector)
            """
        },
        ("tests/test_damping.py::test_powell_sign_leaves_positive_curvature", f"{PARITY}[None-robust_loss]"),
    ),
    Break(
        "the dense inverse update never lands",
        {
            "kfqn_core.estimate.inverses.DenseInverse.append": """
            def broken(self, s, y, keep):
                bfgs_inverse_update_(self.H.clone(), s, y, keep)
            """
        },
        (
            f"{PARITY}[None-square_loss]",
            "tests/test_inverses.py::test_pairs_side_by_side_enter_as_each_would_alone[nan]",
        ),
    ),
    Break(
        "the update returns its argument",
        {"kfqn_core.maths.secant.bfgs_inverse_update": "broken = lambda H, s, y: H"},
        ("tests/test_secant.py::test_update_moves_the_estimate_and_leaves_its_input",),
    ),
    Break(
        "the factor m dropped: gradients of the mean loss taken for per-sample gradients",
        {
            "kfqn_core.estimate.statistics.Record.mean_gradient": """
            def broken(self):
                return original(self) / self.samples
            """
        },
        (f"{PARITY}[None-square_loss]", f"{PARITY}[5-square_loss]"),
    ),
    Break(
        "the bias column lost from A",
        {
            "kfqn_core.layers.view.LayerView.second_moment": """
            def broken(self, x):
                A = original(self, x)
                if self.has_bias:
                    A[:, -1] = A[:, :, -1] = 0.0
                return A
            """
        },
        ("tests/test_layers.py::test_statistics_are_those_of_the_patches", f"{PARITY}[None-square_loss]"),
    ),
    Break(
        "the averaged pair stored after damping",
        {
            "kfqn_core.estimate.gradient.GradientFactor.damped": """
            def broken(self, s, y):
                s, y = original(self, s, y)
                self.s_mean.copy_(s)
                self.y_mean.copy_(y)
                return s, y
            """
        },
        (
            f"{PARITY}[None-robust_loss]",
            f"{PARITY}[5-robust_loss]",
            "tests/test_gradient.py::test_update_averages_then_damps_then_updates",
        ),
    ),
    Break(
        "A of the start divided by T^2, while its action is not",
        {
            "kfqn_core.estimate.statistics.Record.second_moment": """
            def broken(self):
                return original(self) / self.T**2
            """
        },
        (f"{CNN_PARITY}[KFQN_2022-grouped]",),
    ),
    Break(
        "gradients summed over locations, pre-activations averaged",
        {
            "kfqn_core.estimate.statistics.Record.mean_gradient": """
            def broken(self):
                return original(self) * self.T
            """
        },
        (f"{CNN_PARITY}[KFQN_2022-grouped]",),
    ),
    Break(
        "stale hooks: a copy of the model writes into the original's records",
        {
            "kfqn_core.estimate.registered.Hook.__reduce__": """
            def broken(self):
                return type(self), (self._watch,)
            """,
            "kfqn_core.estimate.hooks.Watch._foreign": "broken = lambda self, module: False",
            "kfqn_core.estimate.graph.reach": "broken = lambda leaf: 'yes'",
        },
        (NO_TRACE,),
    ),
    Break(
        "stale hooks: a pickled model and its optimizer come back without a link between them",
        {
            "kfqn_core.estimate.hooks.Watch.__setstate__": """
            def broken(self, state):
                original(self, state)
                self.remove()
            """
        },
        ("tests/test_hooks.py::test_model_and_optimizer_copied_together_go_on_bitwise[default-pickle-3]",),
    ),
    Break(
        "a foreign backward counts",
        {
            "kfqn_core.estimate.graph.reach": "broken = lambda leaf: 'yes'",
            "kfqn_core.estimate.hooks.Watch._cleared": "broken = lambda self, others: False",
        },
        (CLEARED, "tests/test_uses.py::test_gradients_that_are_taken_and_assigned_count_as_accumulated_ones"),
    ),
    Break(
        "gradients zeroed in place are not noticed",
        {
            "kfqn_core.estimate.hooks.Watch._cleared": """
            def broken(self, others):
                return self.mode != "second pass" and self._weight.grad is None
            """
        },
        (CLEARED,),
    ),
    Break(
        "every rank keeps its own curvature",
        {
            "kfqn_core.parallel.ranks.Ranks.sums": """
            def broken(self, values):
                return list(values) if self.alone else [value * self.size for value in values]
            """
        },
        (f"{RANKS}[2-vectors-default]", f"{RANKS}[2-images-KFQN_2022]"),
    ),
    Break(
        "groups mix up layers",
        {
            "kfqn_core.training.groups.Group.rows": """
            def broken(self, i):
                return original(self, (i + 1) % len(self.layers))
            """
        },
        (
            f"{MOVES}[linear-action-normalised_rows-no decay]",
            "tests/test_groups.py::test_layers_side_by_side_train_as_layers_alone[KFQN_2022]",
        ),
    ),
    Break(
        "the bias column is not moved",
        {
            "kfqn_core.training.groups.Group.parameters": """
            def broken(self, side):
                return [None] * len(self.layers) if side else original(self, side)
            """
        },
        (f"{MOVES}[linear-action-normalised_rows-no decay]", f"{PARITY}[None-square_loss]"),
    ),
    Break(
        "dropout redrawn in the second pass",
        {"kfqn_core.training.preserve.RandomState.set": "broken = lambda self: None"},
        (MASK,),
    ),
    Break(
        "batch-norm statistics moved twice",
        {
            "kfqn_core.training.preserve.restored": """
            @contextmanager
            def broken(modules, devices=()):
                randomness = RandomState.now(devices)
                yield
                randomness.set()
            """,
            "kfqn_core.training.second_pass._other_buffers_restored": """
            @contextmanager
            def broken():
                yield
            """,
        },
        (MASK,),
    ),
]


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name.replace(" ", "-"))
def test_a_deliberate_break_turns_its_tests_red(broken, tmp_path):
    calls = [f"replace({target!r}, {textwrap.dedent(code)!r})" for target, code in broken.places.items()]
    (tmp_path / "the_break.py").write_text("\n".join(["from tests.breaking import replace", *calls, ""]))
    # Processes that a test starts are broken as well: they begin without pytest.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif '--multiprocessing-fork' in sys.orig_argv:\n    import the_break\n"
    )
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "the_break", "--tb=line"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *broken.guards],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    failed = set(re.findall(r"^FAILED (\S+.*?)(?: - .*)?$", result.stdout, flags=re.MULTILINE))
    green = [guard for guard in broken.guards if not any(node.startswith(guard) for node in failed)]
    assert result.returncode == 1, result.stdout + result.stderr
    assert not green, f"{green} did not notice: {broken.name}\n{result.stdout}"
