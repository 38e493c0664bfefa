"""Every table and figure, from the results alone: `summary.csv`, `tables.md` and the figures beside them."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from benchmarks import readme, recipes
from benchmarks.methods import METHODS
from benchmarks.plots import TITLES, frontier, wall_time
from benchmarks.problems import TASKS
from benchmarks.records import RESULTS, Results, rounded
from benchmarks.tables import summary
from kfqn_core.lab import figures

__all__ = ["main"]

INTRODUCTION = """# Results

Written by `python -m benchmarks report`; the protocol is in `benchmarks/README.md`. Losses are means over judged seeds
with 95 % bootstrap intervals; p: paired t-test of log train losses against KFQN's default, not corrected. Test loss at
the lowest validation loss, accuracy at the highest validation accuracy, and in brackets those at the end.
"""
HEADER = (
    "| method | lr, schedule | seeds | steps | train loss | interval | p | test loss | test accuracy | step / Adam | "
    "state / Adam |"
)


def main(arguments: argparse.Namespace) -> int:
    """Write the report beside the results, and README's part of it from the committed ones. 1 if there is nothing."""
    plt.switch_backend("agg")
    frame = summary(arguments.problems, arguments.methods, arguments.results)
    if frame.empty:
        print(f"no finished runs in {arguments.results}: `python -m benchmarks run` makes them")
        return 1
    frame = pd.DataFrame(rounded(frame.to_dict("records")))
    frame.drop(columns="losses").to_csv(arguments.results / "summary.csv", index=False)
    (arguments.results / "tables.md").write_text(_tables(frame, arguments.results), encoding="utf-8")
    figures.use_style()
    for horizon, part in frame[(frame["budget"] == "wall") & (frame["contest"] == "free")].groupby("horizon"):
        _save(wall_time(part, arguments.results), arguments.results / f"wall-{horizon}.svg")
        _save(frontier(part, arguments.results), arguments.results / f"frontier-{horizon}.svg")
    print(f"wrote summary.csv, tables.md and figures to {arguments.results}")
    everything = set(arguments.problems) >= set(readme.PROBLEMS) and set(arguments.methods) == set(METHODS)
    if arguments.results == RESULTS and everything:
        readme.README.write_text(readme.updated(frame), encoding="utf-8")
        _save(wall_time(readme.finalists(frame)), readme.FIGURE)
        recipes.PAGE.write_text(recipes.updated(frame), encoding="utf-8")
        print(f"wrote the tables of {readme.README} and {recipes.PAGE}, and {readme.FIGURE}")
    return 0


def _save(figure: plt.Figure, file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    # No date and no random names inside: the same results give the same file.
    with plt.rc_context({"svg.hashsalt": file.name}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.{digits}g}"


def _tables(frame: pd.DataFrame, folder: Path) -> str:
    parts = [INTRODUCTION]
    for (key, horizon, budget, contest), part in frame.groupby(["problem", "horizon", "budget", "contest"], sort=False):
        equal = "wall time" if budget == "wall" else "steps"
        rate = "constant rate" if contest == "constant" else "any schedule"
        parts += [
            f"## {TITLES[key]}: {horizon}x, equal {equal}, {rate}\n",
            f"The best constant answer has a loss of {_number(part['constant answer'].iloc[0])}.\n",
            HEADER, "|---" * 11 + "|",
        ]  # fmt: skip
        for _, row in part.sort_values("train loss", na_position="last").iterrows():
            accuracy = row.get("best test accuracy")
            cells = (
                row["contestant"] + (f" ({row['unfinished']} diverged)" if row["unfinished"] else ""),
                ", ".join(filter(None, (f"{row['lr']:g}", row["schedule"], row["settings"]))),
                str(row["seeds"]), str(row["steps"]), _number(row["train loss"]),
                f"{_number(row['train low'])} to {_number(row['train high'])}", _number(row["p against KFQN"], 2),
                f"{_number(row.get('best test loss'))} ({_number(row.get('test loss'))})",
                "-" if accuracy is None or pd.isna(accuracy) else f"{accuracy:.3f} ({row['test accuracy']:.3f})",
                f"{row['step / Adam']:.2f} ({row['step low']:.2f} to {row['step high']:.2f})",
                f"{row['state / Adam']:.2f}",
            )  # fmt: skip
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    failures = [f"* {key} {record['method']}: {record['error']}" for key in TASKS
                for record in Results(key, folder).find("failure")]  # fmt: skip
    return "\n".join([*parts, "## Methods that did not run\n", *(failures or ["None."]), ""])
