"""The published method on the published problem, epoch by epoch beside its authors' log, with a safeguard and without.

`python -m benchmarks authors` trains K-BFGS at the authors' values on their MNIST autoencoder for ten epochs, on ten
seeds, and writes every run to `results/authors.jsonl` as it ends; what is there is not run again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn
from tqdm.auto import tqdm

from benchmarks.methods import METHODS, Method
from benchmarks.problems import TASKS
from benchmarks.records import RESULTS, Results
from benchmarks.timing import FAILURES, described_failure
from kfqn_core.lab.problems import Problem
from kfqn_core.lab.training import evaluate, train

__all__ = ["LOG", "main", "table"]

# Training loss after epochs 1 to 10, K-BFGS with lr = 0.3 and lambda = 0.3: the log in the repository of the authors of
# the 2020 paper, renyiryry/kbfgs_neurips2020_public.
LOG = (169.0, 109.6, 85.2, 73.8, 68.0, 65.0, 63.2, 61.7, 60.6, 59.8)
RATE = 0.3
LOST = 1e5  # a loss that no run comes back from
CLOSE = 0.05  # as near to the log as a run has to be


def variants() -> dict[str, Method]:
    """The method as it was published, and with its steps guarded."""
    published = METHODS["kbfgs"]
    guarded = {**published.settings, "safeguard": True}
    return {"guarded": replace(published, name="kbfgs, guarded", settings=guarded), "as published": published}


def main(arguments: argparse.Namespace) -> int:
    """Run what is missing, then print the table."""
    results = Results("authors", arguments.results)
    problem = TASKS["P8"].problem
    for seed in range(arguments.seeds):
        for method in variants().values():
            if not results.of("run", method, seed=seed):
                results.add("run", method, seed=seed, lr=RATE, **_run(problem, method, seed))
    print(table(arguments.results).to_string())
    return 0


def _run(problem: Problem, method: Method, seed: int) -> dict[str, object]:
    """The training loss after every epoch that a run lived to see, and why it ended if it did not see ten."""
    losses: list[float] = []

    def measure(model: nn.Module) -> dict[str, float]:
        losses.append(evaluate(model, problem)[0])
        if not losses[-1] < LOST:
            raise ArithmeticError(f"the training loss is {losses[-1]:.3g}")
        return {"train loss": losses[-1]}

    ended = None
    steps = len(problem.x_train) // problem.batch_size
    try:
        frame = train(
            problem, lambda model: method.build(model, RATE, TASKS["P8"]), steps * len(LOG), seed, eval_every=steps,
            warm_start=method.warm_start, measure=measure, label=f"{method.name} seed {seed}",
        )  # fmt: skip
        ended = frame.attrs.get("stopped")
    except FAILURES as error:
        ended = described_failure(error)
        tqdm.write(f"{method.name} seed {seed}: {ended}")
    return {"loss": [loss for loss in losses[1:] if loss < LOST], "ended": ended}


def table(folder: Path = RESULTS) -> pd.DataFrame:
    """By epoch: the authors' loss, and of either form the mean of the runs that lived, their range, and two counts.

    Returns:
        Rows "1" to "10"; for each form of the method `mean`, `lowest`, `highest`, `alive` (runs whose loss is still
        below 10^5) and `close` (those of them within 5 % of the log), as integers.
    """
    results = Results("authors", folder)
    columns: dict[tuple[str, str], list[float]] = {("authors", "log"): list(LOG)}
    for name, method in variants().items():
        runs = [record["loss"] for record in results.of("run", method)]
        for epoch, target in enumerate(LOG):
            alive = np.array([losses[epoch] for losses in runs if len(losses) > epoch])
            cells = {
                "mean": alive.mean() if len(alive) else np.nan,
                "lowest": alive.min(initial=np.inf), "highest": alive.max(initial=-np.inf),
                "alive": len(alive), "close": int((np.abs(alive / target - 1) <= CLOSE).sum()),
            }  # fmt: skip
            for what, cell in cells.items():
                columns.setdefault((name, what), []).append(cell)
    return pd.DataFrame(columns, index=pd.RangeIndex(1, len(LOG) + 1, name="epoch"))
