"""Does a short run on this machine order the methods as the committed results do?

Step ratios are measured anew, here; rates and schedules are those that the committed results chose. Two methods are
compared only where the committed intervals of their training losses do not overlap: elsewhere there is no order to
reproduce.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from benchmarks.methods import METHODS
from benchmarks.problems import TASKS, available
from benchmarks.protocol import budget_steps, charged_ratio, judged_seeds, measure_costs, run, score
from benchmarks.records import Results
from benchmarks.tables import summary

__all__ = ["expected_order", "main"]

TURNS = 5  # fewer than the benchmark's: an order needs no narrow interval


def expected_order(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs (better, worse) of contestants on one problem whose training-loss intervals do not overlap."""
    rows = frame.sort_values("train loss").to_dict("records")
    return [(a["contestant"], b["contestant"]) for a, b in combinations(rows, 2) if a["train high"] < b["train low"]]


def main(arguments: argparse.Namespace) -> int:
    """0 if every expected order is reproduced, 1 if one is not, or if there is nothing to reproduce."""
    frame = summary(available(arguments.problems), arguments.methods, arguments.results)
    if not frame.empty:
        frame = frame[(frame["horizon"] == 1) & (frame["budget"] == "wall") & (frame["contest"] == "free")]
    if frame.empty:
        print(f"{arguments.results} holds no finished runs of these problems and methods: nothing to reproduce")
        return 1
    wrong = compared = 0
    for key, part in frame.groupby("problem"):
        means = _fresh_means(key, part, arguments.seeds)
        for better, worse in expected_order(part):
            compared += 1
            if not means[better] < means[worse]:
                wrong += 1
                print(f"{key}: {better} {means[better]:.4g} is not below {worse} {means[worse]:.4g}")
        print(f"{key}: " + ", ".join(f"{name} {means[name]:.4g}" for name in sorted(means, key=means.__getitem__)))
    print(f"{compared - wrong} of {compared} orders reproduced")
    return int(wrong > 0 or compared == 0)


def _fresh_means(key: str, part: pd.DataFrame, seeds: int) -> dict[str, float]:
    task = TASKS[key]
    assert task.steps is not None
    means: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Results(key, Path(folder))
        measure_costs(task, [METHODS[name] for name in dict.fromkeys(part["method"])], here, TURNS)
        known: dict[tuple[str, float, str], float] = {}  # a tuned rate may be the one promised without tuning
        for row in tqdm(part.to_dict("records"), desc=f"{key}, {seeds} seeds", leave=False):
            method, choice = METHODS[row["method"]], (row["method"], row["lr"], row["schedule"])
            if choice not in known:
                ratio = charged_ratio(method, here)
                steps = 1 if ratio is None else budget_steps(task.steps, 1, ratio, "wall")
                losses = [score(run(task, method, *choice[1:], seed, steps)) for seed in judged_seeds(seeds)]
                known[choice] = float("inf") if ratio is None else float(np.mean(losses))
            means[row["contestant"]] = known[choice]
    return means
