"""One style for every figure of the book: readable by the colour-blind and on a grey print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from kfqn_core.lab.checks import relative_error

__all__ = ["COLORS", "LINE_STYLES", "compare_matrices", "show_images", "use_style"]

# Indigo, rose, gold, black, green, light blue (after Paul Tol's schemes). Every two differ in luminance by more than
# 0.11, so they stay apart in grey and for every kind of colour blindness; neighbours differ most.
COLORS = ("#332288", "#BB5566", "#DDAA33", "#000000", "#117733", "#99DDFF")

# The second cue beside colour, used in the same order.
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

# For what has no sign: luminance rises with the value, also on a grey print.
_MATRIX_MAP = "cividis"

# For what has one: zero is white, so that what is not there is not seen.
_SIGNED_MAP = "PuOr"


def use_style() -> None:
    """Set matplotlib's defaults for the figures that follow."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 120,
            "font.size": 11,
            "axes.titlesize": 11,
            "axes.labelsize": 11,
            "legend.fontsize": 10,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,  # no grid across bars
            "grid.color": "#dddddd",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "image.cmap": _MATRIX_MAP,
            "image.interpolation": "nearest",
            "axes.prop_cycle": cycler(color=COLORS) + cycler(linestyle=LINE_STYLES),
        }
    )


def compare_matrices(
    exact: ArrayLike,
    approximation: ArrayLike,
    titles: Sequence[str] = ("exact", "approximation", "difference"),
) -> tuple[Figure, np.ndarray]:
    """`exact | approximation | difference` side by side, on one colour scale in which zero is white.

    `exact` and `approximation` are tensors or arrays of one shape `[rows, columns]`. The relative error stands
    below the difference. Returns the figure and its three axes.
    """
    exact, approximation = np.asarray(exact, dtype=float), np.asarray(approximation, dtype=float)
    if exact.ndim != 2 or exact.shape != approximation.shape:
        raise ValueError(
            f"compare_matrices: expected two matrices of one shape, got {exact.shape} and {approximation.shape}"
        )
    if len(titles) != 3:
        raise ValueError(f"compare_matrices: expected three titles, got {len(titles)}: {tuple(titles)}")
    panels = (exact, approximation, exact - approximation)
    limit = max(np.abs(panel).max() for panel in panels) or 1.0
    fig, axes = plt.subplots(1, 3, figsize=(9.0, 3.2))
    for ax, panel, title in zip(axes, panels, titles, strict=True):
        image = ax.imshow(panel, cmap=_SIGNED_MAP, vmin=-limit, vmax=limit)
        ax.set_title(title)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    axes[2].set_xlabel(f"relative error {relative_error(approximation, exact):.1e}")
    fig.colorbar(image, ax=list(axes), shrink=0.8)
    return fig, axes


def show_images(rows: Mapping[str, ArrayLike], pixels: tuple[int, int]) -> tuple[Figure, np.ndarray]:
    """One labelled row of grey images per entry; each entry is `[images, height * width]` with values in [0, 1].

    `pixels` is `(height, width)`. Returns the figure and the axes, `[rows, images]`.
    """
    images = {label: np.asarray(row, dtype=float) for label, row in rows.items()}
    counts = {len(row) for row in images.values()}
    if len(counts) != 1:
        raise ValueError(f"show_images: every row needs the same number of images, got {sorted(counts)}")
    columns = counts.pop()
    fig, axes = plt.subplots(len(images), columns, figsize=(0.75 * columns + 1.4, 0.78 * len(images)), squeeze=False)
    for row_axes, (label, row) in zip(axes, images.items(), strict=True):
        for ax, image in zip(row_axes, row, strict=True):
            ax.imshow(image.reshape(pixels), cmap="gray_r", vmin=0.0, vmax=1.0)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set(visible=True, color="#bbbbbb")  # a frame: where the paper is white, an empty corner is too
        row_axes[0].set_ylabel(label, rotation=0, ha="right", va="center")
    return fig, axes
