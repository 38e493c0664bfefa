"""What a step costs, as a ratio: methods take turns in one process, and each turn is compared with its neighbours'.

A busy machine slows whoever runs at that moment. Short turns, one method after the other, put the same disturbance on
both sides of a ratio; the median over turns ignores the turns in which something else woke up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.methods import METHODS, Method, state_bytes
from benchmarks.problems import Task
from kfqn_core import KFQN
from kfqn_core.lab.training import batches, make_closure
from kfqn_core.training.options import refreshes

__all__ = ["Ratio", "StepCost", "mean_interval", "paired_ratios", "parts_of", "step_cost", "stepper"]

TURNS = 31  # the median's 95 % interval then runs from the 11th to the 21st turn
STEPS, SECONDS = (
    4,
    0.05,
)  # a turn has as many steps at least, and lasts as long: a scheduler's slice is some milliseconds
REFERENCES = ("adam", "sgd")
NEVER = 10**9  # a refresh interval that no run reaches


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


def mean_interval(method: Method, steps: int | None) -> float:
    """Steps between curvature updates of KFQN, on average over `steps`: its default begins with every step."""
    steps = steps or 200
    return method.settings.get("refresh") or steps / sum(refreshes(step, None) for step in range(steps))


def parts_of(method: Method, steps: int | None) -> dict[str, tuple[Method, float]]:
    """The kinds of steps whose mixture changes along a run, each as a method and with its share in `steps` steps."""
    if method.constructor is not KFQN or method.settings.get("refresh") is not None:
        return {method.name: (method, 1.0)}
    share = 1.0 / mean_interval(method, steps)
    kinds = {"updating": (1, share), "coasting": (NEVER, 1.0 - share)}
    return {
        f"{method.name}, {kind}": (replace(method, settings={**method.settings, "refresh": refresh}), weight)
        for kind, (refresh, weight) in kinds.items()
    }


def stepper(task: Task, method: Method, *, warm_up: int = 3) -> tuple[Callable[[], None], object]:
    """A function that takes one training step of a method at its smallest learning rate, and the optimizer.

    The first steps, in which state is allocated and first inverses are taken, are already behind it.
    """
    problem = task.problem
    model = problem.model(seed=0)
    optimizer = method.build(model, min(method.grid(task)), task)
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


def step_cost(task: Task, name: str, *, turns: int = TURNS) -> StepCost:
    """Measure one method against Adam and SGD with momentum, all taking turns.

    Steps that update curvature and steps that do not are measured apart where their mixture changes along a run, and
    put together as they occur in N steps. Over 10 N steps such a method costs a little less than this.
    """
    method = METHODS[name]
    parts = parts_of(method, task.steps)
    made = {entry: stepper(task, part) for entry, (part, _) in parts.items()}
    made |= {entry: stepper(task, METHODS[entry]) for entry in REFERENCES if entry not in made}
    # A turn covers whole periods of the method.
    per_turn = {
        entry: _steps_per_turn(step, method.period if entry in parts else 1) for entry, (step, _) in made.items()
    }
    seconds = paired_ratios(
        {entry: step for entry, (step, _) in made.items()},
        per_turn,
        turns=turns,
        label=f"{task.key} {name}",
    )
    own = sum(weight * seconds[part] for part, (_, weight) in parts.items())
    held = {entry: state_bytes(optimizer) for entry, (_, optimizer) in made.items()}
    return StepCost(
        *(Ratio.of(own / seconds[reference]) for reference in REFERENCES),
        adam_ms=float(np.median(seconds["adam"]) * 1e3),
        bytes=held[next(iter(parts))],
        bytes_to_adam=held[next(iter(parts))] / held["adam"],
    )


def one_thread() -> None:
    """Torch threads of a benchmark wait for each other wherever another process runs."""
    torch.set_num_threads(1)
