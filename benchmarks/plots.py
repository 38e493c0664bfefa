"""The figures of the comparison, drawn from the results alone; the report saves them and chapter 13 shows them."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import ticker

from benchmarks.records import RESULTS
from benchmarks.tables import HERO, curves
from kfqn_core.lab import figures

__all__ = ["TITLES", "frontier", "wall_time"]

TITLES = {
    "P1": "P1: CURVES autoencoder",
    "P2": "P2: digits autoencoder",
    "P3": "P3: digits CNN",
    "P5": "P5: photographs CNN",
    "P6": "P6: P5 without batch norm",
    "P7": "P7: P2 with tanh",
    "P8": "P8: MNIST autoencoder",
    "P9": "P9: CIFAR-10 ResNet",
    "P10": "P10: byte-level GPT",
    "P11": "P11: table MLP",
    "P12": "P12: photograph",
    "P13": "P13: digits VAE",
    "P14": "P14: wide MLP",
    "P15": "P15: Friedman's function",
    "P16": "P16: chirps CNN",
    "P17": "P17: sorting transformer",
}
CONTESTANTS = (HERO, "Muon", "SOAP", "Adam", "SGD with momentum", "K-BFGS 2020")  # one per colour of the shared style


def wall_time(frame: pd.DataFrame, folder: Path = RESULTS) -> plt.Figure:
    """Training loss against time in Adam steps: steps times the measured ratio, the same clock for every method.

    `frame` holds the rows of `tables.summary` at one horizon and equal wall time; a line is the mean over judged seeds.
    """
    figure, panels = _panels(frame)
    for key, ax in panels:
        for row, curve, look in _lines(frame, key, folder):
            ax.plot(curve["step"] * row["step / Adam"], curve["train loss"], **look)
        ax.set(title=TITLES[key], yscale="log", xlabel="time in Adam steps", ylabel="train loss")
    return _with_legend(figure, panels)


def frontier(frame: pd.DataFrame, folder: Path = RESULTS) -> plt.Figure:
    """Test against training loss along the run: low and left is good; a dot marks the end. `frame` as above."""
    figure, panels = _panels(frame)
    for key, ax in panels:
        for _, curve, look in _lines(frame, key, folder):
            ax.plot(curve["train loss"], curve["test loss"], **look)
            ax.plot(curve["train loss"][-1], curve["test loss"][-1], "o", color=look["color"])
        ax.set(title=TITLES[key], xscale="log", yscale="log", xlabel="train loss", ylabel="test loss")
    return _with_legend(figure, panels)


def _panels(frame: pd.DataFrame) -> tuple[plt.Figure, list[tuple[str, plt.Axes]]]:
    keys = [key for key in TITLES if key in set(frame["problem"])]
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.3 * columns, 2.8 * rows + 0.5), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.1)  # inches: the title of a panel belongs to it, not to the one above
    for ax in axes.flat[len(keys) :]:
        ax.remove()
    return figure, list(zip(keys, axes.flat, strict=False))


def _lines(frame: pd.DataFrame, key: str, folder: Path) -> list[tuple[pd.Series, dict[str, np.ndarray], dict]]:
    """Row, mean curve and look of every contestant that has a place in the figures; its look is always the same."""
    found = []
    for label, color, style in zip(CONTESTANTS, figures.COLORS, figures.LINE_STYLES, strict=True):
        for _, row in frame[(frame["problem"] == key) & (frame["contestant"] == label)].iterrows():
            if runs := curves(key, row, folder):
                mean = {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}
                found.append((row, mean, {"color": color, "linestyle": style, "label": label}))
    return found


def _with_legend(figure: plt.Figure, panels: list[tuple[str, plt.Axes]]) -> plt.Figure:
    for _, ax in panels:
        for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            if axis.get_scale() == "log" and high < 30 * low:  # powers of ten would be too few ticks
                axis.set_major_locator(ticker.MaxNLocator(4))
                axis.set_major_formatter(ticker.ScalarFormatter())
                axis.set_minor_locator(ticker.NullLocator())
    handles = {label: line for _, ax in panels for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(3, len(handles)))
    return figure
