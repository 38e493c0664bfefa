"""One row per contestant: a problem, a horizon, a budget, a method with its choice of rate, over the judged seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.methods import METHODS, Method
from benchmarks.problems import TASKS, Task
from benchmarks.protocol import MORE_SEEDS, Choice, budget_steps, charged_ratio, cheapest, choices, score
from benchmarks.records import Results
from benchmarks.statistics import holm, mean_interval, mean_log_ratio, paired_p

__all__ = ["HERO", "OURS", "against_peers", "against_tuned", "curves", "summary"]

HERO = "KFQN, default"  # what every other row is compared with
OURS = ("KFQN, default", "KFQN, tuned")


def summary(problems: list[str], methods: list[str], folder: Path) -> pd.DataFrame:
    """Everything that the finished runs say, one row per contestant; empty if there are none.

    `contest` is `"free"` where every schedule was allowed and `"constant"` where the rate is constant.
    """
    rows: list[dict[str, Any]] = []
    for key in problems:
        results = Results(key, folder)
        for horizon in (1, 10):
            for budget in ("wall", "steps"):
                part = [row for method in cheapest([METHODS[name] for name in methods], results)
                        for row in _rows(TASKS[key], method, results, horizon, budget)]  # fmt: skip
                for contest in ("free", "constant"):
                    own = [row for row in part if row["contest"] == contest]
                    hero = next((row["losses"] for row in own if row["contestant"] == HERO), {})
                    for row in own:
                        common = sorted(hero.keys() & row["losses"].keys())
                        row["p against KFQN"] = paired_p([row["losses"][s] for s in common], [hero[s] for s in common])
                    rows += own
    return pd.DataFrame(rows)


def curves(key: str, row: pd.Series, folder: Path) -> list[dict[str, Any]]:
    """The curves of the runs behind a row of the summary, one per seed."""
    found = Results(key, folder).of("run", METHODS[row["method"]], lr=row["lr"], schedule=row["schedule"],
                                    steps=row["steps"])  # fmt: skip
    return [record["curve"] for record in found if "curve" in record]


def _rows(task: Task, method: Method, results: Results, horizon: int, budget: str) -> list[dict[str, Any]]:
    ratio = charged_ratio(method, results)
    if ratio is None or task.steps is None:
        return []
    constant = results.find("constant answer")
    cost = results.of("step cost", method)[-1]
    tuning_steps = budget_steps(task.steps, 1, ratio, "wall")

    def recorded(choice: Choice, seed: int) -> float | None:
        runs = choice.records(results, seed=seed, steps=tuning_steps)
        return score(runs[-1]) if runs else None

    chosen = choices(task, method, recorded)
    steps = budget_steps(task.steps, horizon, ratio, budget)
    rows = []
    for name, choice in (chosen or {}).items():
        runs = {run["seed"]: run for run in choice.records(results, steps=steps) if run["seed"] > max(MORE_SEEDS)}
        if not runs or (budget == "steps" and "constant" in name):
            continue
        own = method.default_lr is not None
        mean, low, high = mean_interval([score(run) for run in runs.values()])
        rows.append({
            "problem": task.key, "horizon": horizon, "budget": budget,
            "contest": "constant" if "constant" in name else "free", "method": method.name,
            "contestant": f"{method.label}, {'default' if 'default' in name else 'tuned'}" if own else method.label,
            "lr": choice.lr, "schedule": choice.schedule, "settings": _tuned(choice.method, method),
            "seeds": len(runs), "steps": steps,
            "train loss": mean, "train low": low, "train high": high,
            **_tested(list(runs.values())),
            "unfinished": sum(math.isinf(score(run)) for run in runs.values()),
            "step / Adam": cost["to_adam"]["value"], "step low": cost["to_adam"]["low"],
            "step high": cost["to_adam"]["high"], "step charged": ratio, "Adam ms": cost["adam_ms"],
            "state / Adam": cost["bytes_to_adam"], "losses": {seed: score(run) for seed, run in runs.items()},
            "constant answer": constant[-1]["loss"] if constant else math.nan,
        })  # fmt: skip
    return rows


def _tuned(variant: Method, method: Method) -> str:
    """The settings that were tuned with the rate, as words."""
    return ", ".join(f"{name} {variant.settings[name]:g}" for name in method.tuned)


def _tested(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Test loss, and accuracy where there are classes, at the end and at the best moment, with intervals."""
    finished = [run for run in runs if run["train loss"] is not None]
    columns: dict[str, float] = {}
    for metric, moment in (("test loss", "best"), ("test accuracy", "most accurate")):
        if not finished or metric not in finished[0]:
            continue
        columns[metric] = float(np.mean([run[metric] for run in finished]))
        at_best = mean_interval([run[moment][metric] for run in finished])
        columns |= dict(zip((f"best {metric}", f"best {metric} low", f"best {metric} high"), at_best, strict=True))
    return columns


def against_peers(frame: pd.DataFrame, contest: str = "free", budget: str = "wall", horizon: int = 1) -> pd.DataFrame:
    """The default against the peer with the lowest mean loss, problem by problem.

    `ratio` is that of geometric means with its 95 % interval over seeds, below one where the default is ahead; `p` of
    a paired t-test on logarithms, and with Holm's correction for as many problems as there are.
    """
    rows = []
    part = frame[(frame["contest"] == contest) & (frame["budget"] == budget) & (frame["horizon"] == horizon)]
    for key, of in part.groupby("problem", sort=False):
        hero = of[of["contestant"] == HERO]
        peers = of[~of["method"].str.startswith("kfqn") & of["train loss"].notna()]
        peers = peers[~np.isinf(peers["train loss"])]
        if hero.empty or peers.empty:
            continue
        rows.append({"problem": key, **_compared(hero.iloc[0], peers.loc[peers["train loss"].idxmin()])})
    table = pd.DataFrame(rows)
    return table if table.empty else table.assign(**{"p, Holm": holm(table["p"])})


def against_tuned(frame: pd.DataFrame, contest: str = "free") -> pd.DataFrame:
    """The default against KFQN with everything tuned, problem by problem, as in `against_peers`."""
    part = frame[(frame["contest"] == contest) & (frame["budget"] == "wall") & (frame["horizon"] == 1)]
    rows = []
    for key, of in part.groupby("problem", sort=False):
        hero, tuned = (of[of["contestant"] == label] for label in OURS)
        if not hero.empty and not tuned.empty:
            rows.append({"problem": key, **_compared(hero.iloc[0], tuned.iloc[0])})
    return pd.DataFrame(rows)


def _compared(hero: pd.Series, other: pd.Series) -> dict[str, Any]:
    seeds = sorted(hero["losses"].keys() & other["losses"].keys())
    own, others = ([_finite_or_infinite(row["losses"][seed]) for seed in seeds] for row in (hero, other))
    ratio, low, high = mean_log_ratio(own, others)
    return {
        "against": other["contestant"], "lr": other["lr"], "schedule": other["schedule"], "n": len(seeds),
        "default": hero["train loss"], "other": other["train loss"], "ratio": ratio, "low": low, "high": high,
        "seeds ahead": sum(a < b for a, b in zip(own, others, strict=True)), "p": paired_p(own, others),
    }  # fmt: skip


def _finite_or_infinite(loss: float | None) -> float:
    """A rounded table holds None where a run did not reach its end."""
    return math.inf if loss is None else loss
