"""What to expect in the place of another optimizer: the table of the book's recipes, from the results alone."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.methods import METHODS
from benchmarks.readme import BEGIN, END, README, finalists, span
from benchmarks.tables import HERO, OURS

__all__ = ["PAGE", "table", "updated"]

PEERS = ("sgd", "adam", "muon", "soap", "shampoo", "psgd", "kfac")  # in whose place the page puts KFQN, and PSGD
PAGE = README.parent / "chapters" / "recipes.md"
HEADER = "| in the place of | time of a step | state | training loss in the same time | problems |"


def table(frame: pd.DataFrame) -> str:
    """KFQN's default over each peer, smallest to largest quotient over the problems that both have finished.

    Below, the peers of which nothing was measured.
    """
    rows = finalists(frame)
    hero = rows[rows["contestant"] == HERO].set_index("problem")
    lines, unknown = [HEADER, "|---" * 5 + "|"], [METHODS[name].label for name in PEERS]
    for contestant in rows["contestant"].unique():
        peer = rows[(rows["contestant"] == contestant) & np.isfinite(rows["train loss"])].set_index("problem")
        common = hero.index.intersection(peer.index)
        if contestant in OURS or common.empty:
            continue
        unknown = [label for label in unknown if label != contestant]
        cells = [
            span(hero.loc[common, name] / peer.loc[common, name])
            for name in ("step / Adam", "state / Adam", "train loss")
        ]
        lines.append(f"| {' | '.join([contestant, *cells, str(len(common))])} |")
    if unknown:
        lines += ["", f"Not measured yet with this protocol: {', '.join(unknown)}."]
    return "\n".join(lines)


def updated(frame: pd.DataFrame) -> str:
    """The page with the table of `frame` between its markers."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{begin}\n\n{table(frame)}\n\n{END}{rest.partition(END)[2]}"
