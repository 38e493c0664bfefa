"""What a step costs, as a ratio: methods take turns in one process, and each turn is compared with its neighbours'.

A busy machine slows whoever runs at that moment. Short turns, one method after the other, put the same disturbance on
both sides of a ratio; the median over turns ignores the turns in which something else woke up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.methods import METHODS, Method, state_bytes
from benchmarks.problems import Task
from kfqn_core import KFQN
from kfqn_core.lab.training import batches, make_closure
from kfqn_core.training.options import refreshes

__all__ = [
    "FAILURES", "Ratio", "StepCost", "described_failure", "mean_interval", "mixed", "paired_ratios", "parts_of",
    "step_cost", "step_costs", "stepper", "update_share",
]  # fmt: skip

TURNS = 31  # the median's 95 % interval then runs from the 11th to the 21st turn
STEPS, SECONDS = 4, 0.05  # a turn has so many steps at least, and lasts so long: a scheduler's slice is milliseconds
REFERENCES = ("adam", "sgd")
NEVER = 10**9  # a refresh interval that no run reaches
USUAL_STEPS, ROUNDS = 200, 10
FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ArithmeticError)


def described_failure(error: Exception) -> str:
    """The message of an error, as it is recorded."""
    return f"{type(error).__name__}: {error}"[:300]


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios and its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Ratio:
        """Median, and the order statistics that hold it with about 95 % probability (binomial, nothing assumed)."""
        ordered = np.sort(samples)
        n = len(ordered)
        below = int(np.floor(n / 2 - 0.98 * np.sqrt(n)))  # normal approximation of the binomial quantile
        below = min(max(below, 0), (n - 1) // 2)
        return cls(float(np.median(ordered)), float(ordered[below]), float(ordered[n - 1 - below]))


def paired_ratios(
    steps: Mapping[str, Callable[[], None]],
    per_turn: Mapping[str, int],
    *,
    turns: int = TURNS,
    wait: Callable[[], None] = lambda: None,
    label: str = "timing",
) -> dict[str, np.ndarray]:
    """Seconds per step of every entry of `steps` in each of `turns` rounds, taken in turns.

    `per_turn` says how many steps make a turn. The order is reversed every round, so that no one always runs on warm
    caches. One round that is not counted goes before. `wait` lets a device finish its queue.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in tqdm(range(turns + 1), desc=label, leave=False):
        for name in list(steps) if turn % 2 else reversed(list(steps)):
            step, count = steps[name], per_turn[name]
            wait()
            start = time.perf_counter()
            for _ in range(count):
                step()
            wait()
            if turn:
                seconds[name].append((time.perf_counter() - start) / count)
    return {name: np.array(values) for name, values in seconds.items()}


def update_share(method: Method, steps: int) -> float:
    """The share of `steps` steps of KFQN in which curvature is updated: its default begins with every step."""
    return sum(refreshes(step, method.settings.get("refresh")) for step in range(steps)) / steps


def mean_interval(method: Method, steps: int | None) -> float:
    """Steps between curvature updates of KFQN, on average over `steps`."""
    return 1 / update_share(method, steps or USUAL_STEPS)


def parts_of(method: Method) -> dict[str, Method]:
    """The kinds of steps whose mixture changes along a run, each as a method, the updating one first."""
    if method.constructor is not KFQN or method.settings.get("refresh") is not None:
        return {method.name: method}
    kinds = {"updating": 1, "coasting": NEVER}
    return {
        f"{method.name}, {kind}": replace(method, settings={**method.settings, "refresh": refresh})
        for kind, refresh in kinds.items()
    }


def mixed(method: Method, seconds: Sequence[np.ndarray], adam: np.ndarray, N: int | None) -> np.ndarray:
    """Seconds per step of a method, from those of its parts, as they occur in a run that takes as long as N of Adam's.

    The mixture depends on how many steps the run has, and that on the mixture: a few rounds settle both.
    """
    if len(seconds) == 1:
        return seconds[0]
    updating, coasting = seconds
    steps = N = N or USUAL_STEPS
    for _ in range(ROUNDS):
        share = update_share(method, steps)
        both = share * updating + (1 - share) * coasting
        steps = max(1, round(N / float(np.median(both / adam))))
    return both


def stepper(task: Task, method: Method, *, warm_up: int = 3) -> tuple[Callable[[], None], object]:
    """A function that takes one training step of a method at a small learning rate, and the optimizer.

    The first steps, in which state is allocated and first inverses are taken, are already behind it.
    """
    problem = task.problem
    model = problem.model(seed=0)
    optimizer = method.build(model, method.first_rate(task) / 3, task)
    if method.warm_start:
        optimizer.warm_start(problem.x_train.split(problem.batch_size))
    stream = batches(problem, seed=0)

    def step() -> None:
        optimizer.step(make_closure(problem, model, optimizer, *next(stream)))

    for _ in range(max(warm_up, method.period + 1)):
        step()
    return step, optimizer


def _steps_per_turn(step: Callable[[], None], period: int) -> int:
    """The smallest number of whole periods that makes a turn."""
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    estimate = (time.perf_counter() - start) / STEPS
    return period * math.ceil(max(STEPS, SECONDS / estimate) / period)


@dataclass(frozen=True)
class StepCost:
    """A method's step on one problem: against Adam's and SGD's in time, against Adam's in bytes of state."""

    to_adam: Ratio
    to_sgd: Ratio
    adam_ms: float
    bytes: int
    bytes_to_adam: float


def step_costs(task: Task, methods: Sequence[Method], *, turns: int = TURNS) -> dict[str, StepCost | str]:
    """Measure methods against Adam and SGD with momentum, all taking turns in one sitting.

    Steps that update curvature and steps that do not are measured apart where their mixture changes along a run, and
    put together as they occur in a run of the same time. Over ten times the time such a method costs less than this.

    Returns:
        By name; for a method that fails on this problem, its message.
    """
    found: dict[str, StepCost | str] = {}
    parts: dict[str, dict[str, Method]] = {}
    made: dict[str, tuple[Callable[[], None], object]] = {}
    for method in methods:
        own = parts_of(method)
        try:
            made |= {entry: stepper(task, part) for entry, part in own.items()}
            parts[method.name] = own
        except FAILURES as error:
            found[method.name] = described_failure(error)
    made |= {entry: stepper(task, METHODS[entry]) for entry in REFERENCES if entry not in made}
    # A turn covers whole periods of a method.
    periods = {entry: part.period for own in parts.values() for entry, part in own.items()}
    seconds = paired_ratios(
        {entry: step for entry, (step, _) in made.items()},
        {entry: _steps_per_turn(step, periods.get(entry, 1)) for entry, (step, _) in made.items()},
        turns=turns,
        label=f"{task.key} step costs",
    )
    held = {entry: state_bytes(optimizer) for entry, (_, optimizer) in made.items()}
    for name, own in parts.items():
        both = mixed(METHODS[name], [seconds[entry] for entry in own], seconds["adam"], task.steps)
        bytes_held = held[next(iter(own))]
        found[name] = StepCost(
            *(Ratio.of(both / seconds[reference]) for reference in REFERENCES),
            adam_ms=float(np.median(seconds["adam"]) * 1e3),
            bytes=bytes_held,
            bytes_to_adam=bytes_held / held["adam"],
        )
    return found


def step_cost(task: Task, name: str, *, turns: int = TURNS) -> StepCost:
    """That of one method.

    Raises:
        RuntimeError: if it fails on this problem.
    """
    cost = step_costs(task, [METHODS[name]], turns=turns)[name]
    if isinstance(cost, str):
        raise RuntimeError(cost)
    return cost


def one_thread() -> None:
    """Torch threads of a benchmark wait for each other wherever another process runs."""
    torch.set_num_threads(1)
