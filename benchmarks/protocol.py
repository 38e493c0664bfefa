"""The protocol: what every method gets, and what is recorded of it.

Equal wall time: a method whose step costs r times Adam's on a problem gets N/r steps (N: `problems.py`). All r of a
problem are measured in one sitting; of their 95 % intervals our methods pay the upper end and peers the lower.

Every method is tuned alike, by the final training loss at equal wall time. On seed 0 its rate walks up and down the
ladder 1, 3, 10, ... until the best has a worse neighbour on both sides, under each of four schedules; the best three
of all combinations are run on seeds 1 and 2 as well, and the lowest mean logarithm of the loss over the three seeds is
the choice. It is judged on seeds 10 to 19. The same is done once more for the constant rate alone, which is what
a training script without a schedule does. What a method promises without tuning is run beside it, under a linear decay
and with a constant rate. At equal steps (N for everyone), and at ten times the budget, the choice stays what it was.

The default of KFQN was chosen on seeds 0 to 2 of some of these problems (NOTES.md). A seed fixes initial weights and
order of data, the same for all.

The test set is cut in two by alternating samples: on one half the best moment of a run is chosen (validation), on the
other it is reported (test). The untrained network is no moment of a run. The training set stays whole, so that losses
compare with other work on these problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.methods import Method
from benchmarks.problems import Task
from benchmarks.records import Results
from benchmarks.timing import FAILURES, TURNS, StepCost, described_failure, step_costs
from kfqn_core import KFQN
from kfqn_core.lab.problems import Problem
from kfqn_core.lab.training import cosine, evaluate, last_fifth, linear, train

__all__ = [
    "BUDGETS", "LADDER", "SCHEDULES", "Choice", "Contest", "budget_steps", "charged_ratio", "cheapest",
    "choices", "judged_seeds",
    "measure_costs", "run", "score",
]  # fmt: skip

POINTS = 12  # evaluations along a run
PROBE = 1000  # training samples looked at along a run; the final training loss is over all of them
BUDGETS = ("wall", "steps")
SCHEDULES: dict[str, Callable[[float], float] | None] = {
    "cosine": cosine, "linear": linear, "last fifth": last_fifth, "constant": None,
}  # fmt: skip
DEFAULT_SCHEDULE = "linear"  # README's lines; chosen on seeds 0 to 2 (NOTES.md)
LADDER = tuple(float(f"{digit}e{exponent}") for exponent in range(-6, 2) for digit in (1, 3))
FIRST_SEED, MORE_SEEDS = 0, (1, 2)
FINALISTS = 3


def budget_steps(N: int, horizon: int, ratio: float, budget: str) -> int:
    """How many steps a method gets whose step costs `ratio` of Adam's."""
    if budget not in BUDGETS:
        raise ValueError(f"budget must be one of {BUDGETS}, got {budget!r}")
    return max(1, round(horizon * N / ratio)) if budget == "wall" else horizon * N


def judged_seeds(count: int) -> range:
    """The first `count` seeds on which nothing was chosen."""
    return range(10, 10 + count)


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


def run(task: Task, method: Method, lr: float, schedule: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once. What is recorded: losses at the end and at the best moments for the validation set, and the curve.

    `best` is the moment of the lowest validation loss, `most accurate` that of the highest validation accuracy. A run
    whose loss stops being finite has no losses and says when it stopped; one that raises has its message.
    """
    problem, model = task.problem, task.problem.model(seed)
    outcome: dict[str, Any] = {"lr": lr, "schedule": schedule, "seed": seed, "steps": steps}
    # Labels that K-FAC draws, and whatever else a method draws, are the seed's as well.
    torch.manual_seed(seed)
    try:
        frame = train(
            problem, lambda model: method.build(model, lr, task), steps, seed,
            eval_every=max(1, math.ceil(steps / POINTS)), schedule=SCHEDULES[schedule], warm_start=method.warm_start,
            model=model, measure=measures(problem), label=f"{task.key} {method.name} {lr:g} {schedule} seed {seed}",
        )  # fmt: skip
    except FAILURES as error:
        return {**outcome, "train loss": None, "failed": described_failure(error)}
    seconds = float(frame["seconds"].iloc[-1])
    if "stopped" in frame.attrs:
        return {**outcome, "train loss": None, "seconds": seconds, "stopped": frame.attrs["stopped"]}
    curve = {name: frame[name].tolist() for name in frame.columns if name not in ("epoch", "seconds")}
    tested = [name for name in curve if name.startswith(("validation", "test"))]
    trained = range(1, len(frame))  # the first row is the untrained network

    def moment(i: int) -> dict[str, float]:
        return {"step": curve["step"][i], **{name: curve[name][i] for name in tested}}

    best = {"best": moment(min(trained, key=lambda i: curve["validation loss"][i]))}
    if "validation accuracy" in curve:
        best["most accurate"] = moment(max(trained, key=lambda i: curve["validation accuracy"][i]))
    return {
        **outcome,
        "seconds": seconds,
        "train loss": evaluate(model, problem)[0],
        **{name: curve[name][-1] for name in tested},
        **best,
        "curve": curve,
    }


def score(record: dict[str, Any]) -> float:
    """The final training loss, infinite for a run that did not reach its end."""
    loss = record["train loss"]
    return math.inf if loss is None else loss


def measure_costs(task: Task, methods: Sequence[Method], results: Results, turns: int = TURNS) -> None:
    """The cost of a step of every method against Adam's, in one sitting, unless all are known already.

    And, once for a problem, what an answer that does not look at its input would cost.
    """
    if not results.find("constant answer"):
        results.add("constant answer", None, loss=task.constant_loss())
    if all(results.of("step cost", method) or results.of("failure", method) for method in methods):
        return
    for name, cost in step_costs(task, methods, turns=turns).items():
        method = next(method for method in methods if method.name == name)
        if isinstance(cost, StepCost):
            results.add("step cost", method, **asdict(cost))
        else:
            results.add("failure", method, error=cost)


def charged_ratio(method: Method, results: Results) -> float | None:
    """What a step is charged, in Adam's: the end of the ratio's interval that is the worse one for us. None: failed."""
    if not (kept := results.of("step cost", method)):
        return None
    return kept[-1]["to_adam"]["high" if method.constructor is KFQN else "low"] if method.name != "adam" else 1.0


def cheapest(methods: Sequence[Method], results: Results) -> list[Method]:
    """Of methods with the same label the one whose step costs least; those without a step cost stay as they are."""

    def cost(method: Method) -> float:
        return kept[-1]["to_adam"]["value"] if (kept := results.of("step cost", method)) else math.inf

    return [
        method for method in methods
        if all(cost(method) <= cost(other) for other in methods if other.label == method.label)
    ]  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A method with all that is tuned of it."""

    method: Method
    lr: float
    schedule: str

    def records(self, results: Results, **wanted: Any) -> list[dict[str, Any]]:
        """Its runs."""
        return results.of("run", self.method, lr=self.lr, schedule=self.schedule, **wanted)


def walk(loss: Callable[[float], float], start: float) -> dict[float, float]:
    """Losses along the ladder, from `start` and its neighbours on until the best is not at an end of what was tried."""
    tried: dict[int, float] = {}

    def look(i: int) -> None:
        if 0 <= i < len(LADDER) and i not in tried:
            tried[i] = loss(LADDER[i])

    middle = LADDER.index(start)
    while True:
        for i in (middle, middle - 1, middle + 1):
            look(i)
        best = min(sorted(tried), key=lambda i: tried[i])
        if best == middle:
            return {LADDER[i]: tried[i] for i in sorted(tried)}
        middle = best


class NoRecordError(LookupError):
    """A run that decides about a choice was not made yet."""


def choices(task: Task, method: Method, ensure: Callable[[Choice, int], float | None]) -> dict[str, Choice] | None:
    """What is judged of a method: `tuned`, `constant`, and what it promises untuned.

    Args:
        task: the problem.
        method: that is tuned.
        ensure: gives the score of a choice on a seed, from a run or a record; None where there is no record, which ends
            the search.

    Returns:
        By name; None if a record was missing.
    """

    def look(choice: Choice, seed: int = FIRST_SEED) -> float:
        found = ensure(choice, seed)
        if found is None:
            raise NoRecordError
        return found

    tried: dict[Choice, float] = {}

    def try_rates(variant: Method, schedule: str, start: float) -> float:
        def losses(lr: float) -> float:
            choice = Choice(variant, lr, schedule)
            tried[choice] = look(choice)
            return tried[choice]

        found = walk(losses, start)
        return min(found, key=lambda lr: found[lr])

    try:
        for variant in method.variants():
            try_rates(variant, "cosine", method.first_rate(task))
        best = min(tried, key=lambda choice: tried[choice])
        for schedule in SCHEDULES:
            try_rates(best.method, schedule, best.lr)
        found = {"tuned": _best_of(tried, look)}
        found["constant"] = _best_of({c: loss for c, loss in tried.items() if c.schedule == "constant"}, look)
    except NoRecordError:
        return None
    if method.default_lr is not None:
        found["default"] = Choice(method, method.default_lr, DEFAULT_SCHEDULE)
        found["default, constant"] = Choice(method, method.default_lr, "constant")
    return found


def _best_of(tried: dict[Choice, float], look: Callable[[Choice, int], float]) -> Choice:
    """The best over three seeds of those that are best on the first."""
    finalists = sorted(tried, key=lambda choice: tried[choice])[:FINALISTS]

    def mean(choice: Choice) -> float:
        losses = [tried[choice], *(look(choice, seed) for seed in MORE_SEEDS)]
        return sum(math.log(max(loss, 1e-30)) for loss in losses)

    return min(finalists, key=mean)


@dataclass(frozen=True)
class Contest:
    """One method on one problem over one horizon: tuning runs, then what counts on the judged seeds."""

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
        """Steps at equal wall time over the short horizon, where everything is chosen."""
        assert self.task.steps is not None
        return budget_steps(self.task.steps, 1, self.ratio, "wall")

    def work(self) -> float:
        """About the whole contest in units of Adam steps, done or not: the walks end where they end."""
        tuning = 4 * (len(self.method.variants()) + len(SCHEDULES) - 1) + 2 * FINALISTS * len(MORE_SEEDS)
        contestants = 2 + 2 * (self.method.default_lr is not None)
        return self.ratio * (tuning * self.tuning_steps + contestants * self.seeds * self.steps("wall"))

    def play(self) -> Iterator[float]:
        """Run what is missing; yields the work of every run, done now or before."""
        work: list[float] = []

        def ensure(choice: Choice, seed: int) -> float:
            work.append(self.ratio * self.tuning_steps)
            return score(self._ensure(choice, seed, self.tuning_steps))

        chosen = choices(self.task, self.method, ensure)
        assert chosen is not None
        yield sum(work)
        for name, choice in chosen.items():
            for budget in self.budgets:
                if budget == "steps" and "constant" in name:
                    continue  # at equal steps there is one contest
                for seed in judged_seeds(self.seeds if budget == "wall" else min(self.seeds, 5)):
                    self._ensure(choice, seed, self.steps(budget))
                    yield self.ratio * self.steps(budget)

    def _ensure(self, choice: Choice, seed: int, steps: int) -> dict[str, Any]:
        if kept := choice.records(self.results, seed=seed, steps=steps):
            return kept[-1]
        outcome = run(self.task, choice.method, choice.lr, choice.schedule, seed, steps)
        if seed in (FIRST_SEED, *MORE_SEEDS):
            outcome.pop("curve", None)  # tuning runs are looked at by their end alone
        return self.results.add("run", choice.method, **outcome)


def play(contests: list[Contest]) -> None:
    """Run every contest, with an estimate of the time left."""
    with tqdm(total=round(sum(contest.work() for contest in contests)), unit="step", desc="Adam steps' worth") as bar:
        for contest in contests:
            bar.set_postfix_str(f"{contest.task.key} {contest.method.name}")
            for work in contest.play():
                bar.update(round(work))
