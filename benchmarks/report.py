"""Every table and figure, from the results alone: `summary.csv`, `tables.md` and the figures beside them."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.problems import TASKS
from benchmarks.records import Results, rounded
from benchmarks.tables import HERO, curves, summary
from kfqn_core.lab import figures

__all__ = ["main"]

INTRODUCTION = """# Results

Written by `python -m benchmarks report`; the protocol is in `benchmarks/README.md`. Losses are means over fresh seeds
with 95 % bootstrap intervals; p: paired t-test of log train losses against KFQN, untuned. A * marks a rate on the edge
of its grid. Test metrics are those at the best validation loss, and in brackets those at the end.
"""
HEADER = "| method | lr | steps | train loss | interval | p | test loss | test accuracy | step / Adam | state / Adam |"

IN_FIGURES = (HERO, "Muon", "SOAP", "Adam", "SGD with momentum", "K-BFGS 2020")  # one per colour of the shared style


def main(arguments: argparse.Namespace) -> int:
    """Write the report beside the results. 1 if there is nothing to report."""
    frame = summary(arguments.problems, arguments.methods, arguments.results)
    if frame.empty:
        print(f"no finished runs in {arguments.results}: `python -m benchmarks run` makes them")
        return 1
    frame = pd.DataFrame(rounded(frame.to_dict("records")))
    frame.to_csv(arguments.results / "summary.csv", index=False)
    (arguments.results / "tables.md").write_text(_tables(frame, arguments.results), encoding="utf-8")
    figures.use_style()
    for horizon, part in frame[frame["budget"] == "wall"].groupby("horizon"):
        _wall_time(part, arguments.results, f"wall-{horizon}")
        _frontier(part, arguments.results, f"frontier-{horizon}")
    print(f"wrote summary.csv, tables.md and figures to {arguments.results}")
    return 0


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.{digits}g}"


def _tables(frame: pd.DataFrame, folder: Path) -> str:
    parts = [INTRODUCTION]
    for (key, horizon, budget), part in frame.groupby(["problem", "horizon", "budget"], sort=True):
        name, seeds = TASKS[key].problem.name, part["seeds"].max()
        equal = "wall time" if budget == "wall" else "steps"
        parts += [f"## {key}, {name}: {horizon}x, equal {equal}, {seeds} seeds\n", HEADER, "|---" * 10 + "|"]
        for _, row in part.sort_values("train loss", na_position="last").iterrows():
            accuracy = row.get("best test accuracy")
            cells = (
                row["contestant"] + (f" ({row['unfinished']} diverged)" if row["unfinished"] else ""),
                f"{row['lr']:g}{'*' if row['edge of grid'] else ''}", str(row["steps"]), _number(row["train loss"]),
                f"{_number(row['train low'])} to {_number(row['train high'])}", _number(row["p against KFQN"], 2),
                f"{_number(row.get('best test loss'))} ({_number(row.get('test loss'))})",
                "-" if accuracy is None or pd.isna(accuracy) else f"{accuracy:.3f} ({row['test accuracy']:.3f})",
                f"{row['step / Adam']:.2f}", f"{row['state / Adam']:.2f}",
            )  # fmt: skip
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    failures = [f"* {key} {record['method']}: {record['error']}" for key in TASKS
                for record in Results(key, folder).find("failure")]  # fmt: skip
    return "\n".join([*parts, "## Methods that did not run\n", *(failures or ["None."]), ""])


def _panels(frame: pd.DataFrame) -> tuple[plt.Figure, list[tuple[str, plt.Axes]]]:
    keys = sorted(frame["problem"].unique())
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.0 * columns, 3.2 * rows), squeeze=False)
    for ax in axes.flat[len(keys) :]:
        ax.remove()
    return figure, list(zip(keys, axes.flat, strict=False))


def _shown(frame: pd.DataFrame, key: str) -> list[tuple[str, str, object, pd.Series]]:
    """Label, colour, line style and row of every contestant that has a place in the figures, always the same ones."""
    found = []
    for label, color, style in zip(IN_FIGURES, figures.COLORS, figures.LINE_STYLES, strict=True):
        part = frame[(frame["problem"] == key) & (frame["contestant"] == label)]
        found += [(label, color, style, row) for _, row in part.iterrows()]
    return found


def _mean_curves(key: str, row: pd.Series, folder: Path) -> dict[str, np.ndarray]:
    found = curves(key, row, folder)
    return {name: np.mean([curve[name] for curve in found], axis=0) for name in found[0]} if found else {}


def _finish(figure: plt.Figure, axes: list[tuple[str, plt.Axes]], folder: Path, name: str) -> None:
    handles = {label: line for _, ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    for suffix in ("png", "svg"):
        # No date inside: the same results give the same file.
        figure.savefig(folder / f"{name}.{suffix}", metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def _wall_time(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """Training loss against time in Adam steps: steps times the measured ratio, the same clock for every method."""
    figure, axes = _panels(frame)
    for key, ax in axes:
        for label, color, style, row in _shown(frame, key):
            if curve := _mean_curves(key, row, folder):
                time = curve["step"] * row["step / Adam"]
                ax.plot(time, curve["train loss"], color=color, linestyle=style, label=label)
        ax.set(
            title=f"{key}: {TASKS[key].problem.name}", yscale="log", xlabel="time in Adam steps", ylabel="train loss"
        )
    _finish(figure, axes, folder, name)


def _frontier(frame: pd.DataFrame, folder: Path, name: str) -> None:
    """Test against training loss along the run: low and left is good; a dot marks the end."""
    figure, axes = _panels(frame)
    for key, ax in axes:
        for label, color, style, row in _shown(frame, key):
            if curve := _mean_curves(key, row, folder):
                ax.plot(curve["train loss"], curve["test loss"], color=color, linestyle=style, label=label)
                ax.plot(curve["train loss"][-1], curve["test loss"][-1], "o", color=color)
        ax.set(
            title=f"{key}: {TASKS[key].problem.name}",
            xscale="log",
            yscale="log",
            xlabel="train loss",
            ylabel="test loss",
        )
    _finish(figure, axes, folder, name)
