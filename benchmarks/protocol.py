"""The protocol: what every method gets, and what is recorded of it.

Equal wall time: a method whose step costs r times Adam's on a problem gets N/r steps (N: `problems.py`). Every method
follows the same schedule over exactly its steps: 2 % warm-up, then a cosine to zero. Every method has four learning
rates to choose from, on seed 0, by the final training loss at equal wall time; the best is run on fresh seeds, 2 to 6
(what became of our default was screened on 0 and 1, see NOTES.md). At ten times the budget everyone keeps the rate
chosen at the first: a grid of long runs costs more than the comparison itself.
A method that promises a rate without tuning is run at that rate too. At equal steps (N for everyone) the rate tuned at
equal wall time is used. A seed fixes initial weights and order of data, the same for all.

The test set is cut in two by alternating samples: on one half the best moment of a run is chosen (validation), on the
other it is reported (test). The training set stays whole, so that losses compare with other work on these problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.methods import Method
from benchmarks.problems import Task
from benchmarks.records import Results
from benchmarks.timing import TURNS, step_cost
from kfqn_core.lab.problems import Problem
from kfqn_core.lab.training import cosine, evaluate, train

__all__ = ["BUDGETS", "Contest", "best_rate", "budget_steps", "fresh_seeds", "measured_ratio", "run", "score"]

POINTS = 12  # evaluations along a run
PROBE = 1000  # training samples looked at along a run; the final training loss is over all of them
BUDGETS = ("wall", "steps")


def budget_steps(N: int, horizon: int, ratio: float, budget: str) -> int:
    """How many steps a method gets whose step costs `ratio` of Adam's."""
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {BUDGETS}, got {budget!r}")
    return max(1, round(horizon * N / ratio)) if budget == "wall" else horizon * N


def fresh_seeds(count: int) -> range:
    """The first `count` seeds on which nothing was chosen."""
    return range(2, 2 + count)


def measures(problem: Problem) -> Callable[[nn.Module], dict[str, float]]:
    """Loss, and accuracy where there are classes, on part of the training set and on both halves of the test set."""
    parts = {
        "train": (problem.x_train[:PROBE], problem.y_train[:PROBE]),
        "validation": (problem.x_test[::2], problem.y_test[::2]),
        "test": (problem.x_test[1::2], problem.y_test[1::2]),
    }

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        model.eval()
        columns: dict[str, float] = {}
        for name, (x, y) in parts.items():
            output = torch.cat([model(part) for part in x.split(PROBE)])  # all at once would fill the memory
            columns[f"{name} loss"] = problem.loss(output, y).item()
            if not y.is_floating_point() and name != "train":
                columns[f"{name} accuracy"] = (output.argmax(-1) == y).double().mean().item()
        model.train()
        return columns

    return measure


def run(task: Task, method: Method, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once. What is recorded: losses at the end and at the moment of the best validation loss, and the curve.

    A run whose loss stops being finite has no losses and says when it stopped; one that raises has its message.
    """
    problem, model = task.problem, task.problem.model(seed)
    outcome: dict[str, Any] = {"lr": lr, "seed": seed, "steps": steps}
    # Labels that K-FAC draws, and whatever else a method draws, are the seed's as well.
    torch.manual_seed(seed)
    try:
        frame = train(
            problem, lambda model: method.build(model, lr, task), steps, seed,
            eval_every=max(1, math.ceil(steps / POINTS)), schedule=cosine, warm_start=method.warm_start, model=model,
            measure=measures(problem), label=f"{task.key} {method.name} lr={lr:g} seed={seed}",
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ArithmeticError) as error:
        return {**outcome, "train loss": None, "failed": f"{type(error).__name__}: {error}"[:300]}
    seconds = float(frame["seconds"].iloc[-1])
    if "stopped" in frame.attrs:
        return {**outcome, "train loss": None, "seconds": seconds, "stopped": frame.attrs["stopped"]}
    curve = {name: frame[name].tolist() for name in frame.columns if name not in ("epoch", "seconds")}
    tested = [name for name in curve if name.startswith(("validation", "test"))]
    best = min(range(len(frame)), key=lambda i: curve["validation loss"][i])
    return {
        **outcome,
        "seconds": seconds,
        "train loss": evaluate(model, problem)[0],
        **{name: curve[name][-1] for name in tested},
        "best": {"step": curve["step"][best], **{name: curve[name][best] for name in tested}},
        "curve": curve,
    }


def score(record: dict[str, Any]) -> float:
    """The final training loss, infinite for a run that did not reach its end."""
    loss = record["train loss"]
    return math.inf if loss is None else loss


def measured_ratio(task: Task, method: Method, results: Results, turns: int = TURNS) -> float | None:
    """The cost of a step against Adam's, measured once per problem and kept; None for a method that fails on it."""
    if kept := results.of("step cost", method):
        return kept[-1]["to_adam"]["value"]
    if results.of("failure", method):
        return None
    try:
        cost = step_cost(task, method.name, turns=turns)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ArithmeticError) as error:
        results.add("failure", method, error=f"{type(error).__name__}: {error}"[:300])
        return None
    return results.add("step cost", method, **asdict(cost))["to_adam"]["value"]


def best_rate(task: Task, method: Method, results: Results, steps: int) -> float | None:
    """The rate with the lowest final training loss on seed 0 over `steps`; None before the whole grid was run."""
    tried = {lr: results.of("run", method, lr=lr, seed=0, steps=steps) for lr in method.grid(task)}
    if not all(tried.values()):
        return None
    return min(tried, key=lambda lr: score(tried[lr][-1]))


@dataclass(frozen=True)
class Contest:
    """One method on one problem over one horizon: four short tuning runs, then the rates that count on fresh seeds."""

    task: Task
    method: Method
    results: Results
    horizon: int
    seeds: int
    budgets: tuple[str, ...]
    ratio: float

    def steps(self, budget: str) -> int:
        assert self.task.steps is not None
        return budget_steps(self.task.steps, self.horizon, self.ratio, budget)

    @property
    def tuning_steps(self) -> int:
        """Steps at equal wall time over the short horizon, where rates are chosen."""
        assert self.task.steps is not None
        return budget_steps(self.task.steps, 1, self.ratio, "wall")

    def work(self) -> float:
        """The whole contest in units of Adam steps, done or not."""
        rates = 1 + (self.method.default_lr is not None)
        per_seed = sum({self.steps(budget) for budget in self.budgets})
        return self.ratio * (len(self.method.grid(self.task)) * self.tuning_steps + rates * self.seeds * per_seed)

    def play(self) -> Iterator[float]:
        """Run what is missing; yields the work of every run, done now or before."""
        for lr in self.method.grid(self.task):
            yield self._ensure(lr, 0, self.tuning_steps)
        tuned = best_rate(self.task, self.method, self.results, self.tuning_steps)
        for lr in dict.fromkeys(rate for rate in (tuned, self.method.default_lr) if rate is not None):
            for budget_in_steps in dict.fromkeys(self.steps(budget) for budget in self.budgets):
                for seed in fresh_seeds(self.seeds):
                    yield self._ensure(lr, seed, budget_in_steps)

    def _ensure(self, lr: float, seed: int, steps: int) -> float:
        if not self.results.of("run", self.method, lr=lr, seed=seed, steps=steps):
            outcome = run(self.task, self.method, lr, seed, steps)
            if seed == 0:
                outcome.pop("curve", None)  # tuning runs are looked at by their end alone
            self.results.add("run", self.method, **outcome)
        return self.ratio * steps


def play(contests: list[Contest]) -> None:
    """Run every contest, with an estimate of the time left."""
    with tqdm(total=round(sum(contest.work() for contest in contests)), unit="step", desc="Adam steps' worth") as bar:
        for contest in contests:
            bar.set_postfix_str(f"{contest.task.key} {contest.method.name}")
            for work in contest.play():
                bar.update(round(work))
