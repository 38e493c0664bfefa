"""What a step costs on a model of yours: `python -m benchmarks step-cost --model module:function`.

The function takes a device and returns a model on it and a function without arguments that computes its loss on one
mini-batch, a mean over samples:

    def task(device):
        model = MyModel().to(device)
        x, y = torch.randn(64, 10, device=device), torch.randint(3, (64,), device=device)
        return model, lambda: cross_entropy(model(x), y)

It is called afresh for every optimizer.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

from benchmarks.gpu.fast import Made, rows_of
from kfqn_core import describe
from kfqn_core.lab import figures

__all__ = ["main", "picture", "table"]

FOLDER = Path("out")
COLUMNS = ("eager ms", "graph ms", "operations", "MB of state", "MB at most")


def main(arguments: argparse.Namespace) -> int:
    """Print what `describe` says and the table, and draw it."""
    try:
        made = imported(arguments.model)
    except (ImportError, AttributeError, ValueError) as error:
        print(f"--model {arguments.model}: {error}; give module:function, see `python -m pydoc benchmarks.yours`")
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(made(device)[0]))
    frame = table(made, device)
    print(f"a step on {device}, forward and backward included", frame.to_string(na_rep="-"), sep="\n")
    plt.switch_backend("agg")
    figures.use_style()
    FOLDER.mkdir(exist_ok=True)
    frame.to_csv(FOLDER / "step-cost.csv")
    picture(frame).savefig(FOLDER / "step-cost.svg")
    print(f"kept in {FOLDER / 'step-cost.csv'} and {FOLDER / 'step-cost.svg'}")
    return 0


def imported(name: str) -> Made:
    """`module:function`, from the folder one is in or from what is installed."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError("a colon is missing")
    sys.path.insert(0, str(Path.cwd()))
    return getattr(importlib.import_module(module), function)


def table(made: Made, device: torch.device) -> pd.DataFrame:
    """A row for every optimizer; times in milliseconds, and as a ratio to Adam's of the same kind."""
    rows = rows_of(made, device, detailed=False)
    frame = pd.DataFrame(rows).T
    failed = frame.filter(like="failed")
    frame = frame[[column for column in COLUMNS if column in frame]].apply(pd.to_numeric)
    for mode in ("eager", "graph"):
        if f"{mode} ms" in frame:
            frame.insert(frame.columns.get_loc(f"{mode} ms") + 1, f"{mode} / Adam",
                         frame[f"{mode} ms"] / frame.loc["adam", f"{mode} ms"])  # fmt: skip
    for name, sentence in failed.stack().items():
        print(f"{name[0]}: {name[1]}: {sentence}")
    return frame.astype(float).round(3)


def picture(frame: pd.DataFrame) -> plt.Figure:
    """Time of a step, one bar for every optimizer and kind of step."""
    figure, ax = plt.subplots()
    modes = [mode for mode in ("eager ms", "graph ms") if mode in frame]
    for k, mode in enumerate(modes):
        ax.barh([i + 0.4 * k - 0.2 * (len(modes) - 1) for i in range(len(frame))], frame[mode], height=0.35,
                color=figures.COLORS[k], label=mode)  # fmt: skip
    ax.set(xlabel="milliseconds a step", yticks=range(len(frame)), yticklabels=frame.index)
    ax.invert_yaxis()
    ax.legend()
    return figure
