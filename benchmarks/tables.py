"""One row per contestant: a problem, a horizon, a budget, a method at one learning rate, over its fresh seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.methods import METHODS, Method
from benchmarks.problems import TASKS, Task
from benchmarks.protocol import best_rate, budget_steps, score
from benchmarks.records import Results
from benchmarks.statistics import mean_interval, paired_p

__all__ = ["HERO", "curves", "summary"]

HERO = "KFQN, untuned"  # what every other row is compared with


def summary(problems: list[str], methods: list[str], folder: Path) -> pd.DataFrame:
    """Everything that the finished runs say, one row per contestant; empty if there are none."""
    rows: list[dict[str, Any]] = []
    for key in problems:
        results = Results(key, folder)
        for horizon in (1, 10):
            for budget in ("wall", "steps"):
                part = [row for name in methods for row in _rows(TASKS[key], METHODS[name], results, horizon, budget)]
                hero = next((row["_losses"] for row in part if row["contestant"] == HERO), {})
                for row in part:
                    losses = row.pop("_losses")
                    common = sorted(hero.keys() & losses.keys())
                    row["p against KFQN"] = paired_p([losses[s] for s in common], [hero[s] for s in common])
                rows += part
    return pd.DataFrame(rows)


def curves(key: str, row: pd.Series, folder: Path) -> list[dict[str, Any]]:
    """The curves of the runs behind a row of the summary, one per seed."""
    found = Results(key, folder).of("run", METHODS[row["method"]], lr=row["lr"], steps=row["steps"])
    return [record["curve"] for record in found if record["seed"] and "curve" in record]


def _rows(task: Task, method: Method, results: Results, horizon: int, budget: str) -> list[dict[str, Any]]:
    costs = results.of("step cost", method)
    if not costs or task.steps is None:
        return []
    cost = costs[-1]
    ratio = cost["to_adam"]["value"]
    steps = budget_steps(task.steps, horizon, ratio, budget)
    tuned = best_rate(task, method, results, budget_steps(task.steps, 1, ratio, "wall"))
    contestants = [] if tuned is None else [(method.label + (", tuned" if method.default_lr else ""), tuned)]
    if method.default_lr is not None:
        contestants.append((f"{method.label}, untuned", method.default_lr))
    rows = []
    for label, lr in contestants:
        runs = {run["seed"]: run for run in results.of("run", method, lr=lr, steps=steps) if run["seed"] > 0}
        if not runs:
            continue
        grid = method.grid(task)
        mean, low, high = mean_interval([score(run) for run in runs.values()])
        rows.append({
            "problem": task.key, "horizon": horizon, "budget": budget, "method": method.name, "contestant": label,
            "lr": lr, "edge of grid": lr == tuned and lr in (grid[0], grid[-1]) and "untuned" not in label,
            "seeds": len(runs), "steps": steps,
            "train loss": mean, "train low": low, "train high": high,
            **_tested(list(runs.values())),
            "unfinished": sum(math.isinf(score(run)) for run in runs.values()),
            "step / Adam": ratio, "step low": cost["to_adam"]["low"], "step high": cost["to_adam"]["high"],
            "state / Adam": cost["bytes_to_adam"], "_losses": {seed: score(run) for seed, run in runs.items()},
        })  # fmt: skip
    return rows


def _tested(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Test loss, and accuracy where there are classes, at the end and at the best validation loss, with intervals."""
    finished = [run for run in runs if run["train loss"] is not None]
    columns: dict[str, float] = {}
    for metric in ("test loss", "test accuracy"):
        if not finished or metric not in finished[0]:
            continue
        columns[metric] = float(np.mean([run[metric] for run in finished]))
        at_best = mean_interval([run["best"][metric] for run in finished])
        columns |= dict(zip((f"best {metric}", f"best {metric} low", f"best {metric} high"), at_best, strict=True))
    return columns
