"""README's tables and figure: what comparison and GPU come to, each between two markers, from the results alone."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from benchmarks.gpu import table as gpu
from benchmarks.problems import TASKS
from benchmarks.tables import HERO, against_peers, against_tuned

__all__ = ["BEGIN", "END", "FIGURE", "GPU", "PROBLEMS", "README", "finalists", "span", "table", "updated"]

README = Path(__file__).parent.parent / "README.md"
FIGURE = Path(__file__).parent / "figures" / "loss-against-time.svg"
BEGIN, END = "<!-- written by `python -m benchmarks report` -->", "<!-- end -->"
GPU = "<!-- from benchmarks/results/gpu.jsonl, written by `python -m benchmarks report` -->"
PROBLEMS = tuple(key for key, task in TASKS.items() if task.steps is not None)
METHODS = (
    "kfqn", "kbfgs-5", "kfqn-2022-5", "foof", "isaac", "sgd", "adam", "muon", "muon-bfloat16", "soap", "shampoo",
    "psgd", "kfac",
)  # fmt: skip
EVERYWHERE = {HERO, "Muon", "SOAP", "Adam", "SGD with momentum"}  # a problem that one of them lacks is under way


def finalists(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of `tables.summary` that README shows: the short horizon at equal wall time, under any schedule.

    And the problems that are finished.
    """
    short = (frame["horizon"] == 1) & (frame["budget"] == "wall") & (frame["contest"] == "free")
    rows = frame[short & frame["method"].isin(METHODS)]
    return rows[rows.groupby("problem")["contestant"].transform(lambda names: set(names) >= EVERYWHERE)]


def table(frame: pd.DataFrame) -> str:
    """Training loss at equal wall time, a row per contestant and a column per problem; - where nothing was run.

    Bold: the lowest mean, and every mean whose interval reaches into that of the lowest. Last columns: cost of a step
    and size of the state, smallest to largest over the problems. Methods stand in the order of their mean rank over
    the problems; one without any result is left out. Last comes what an answer costs that does not look at its input.
    Below, how many seeds a mean has, and the default against the
    best peer and against its own best rate.
    """
    rows = finalists(frame)
    keys = [key for key in PROBLEMS if (rows["problem"] == key).any()]
    places = rows.assign(rank=rows.groupby("problem")["train loss"].rank()).groupby("contestant")["rank"].mean()
    lines = [f"| | {' | '.join(keys)} | step / Adam | state / Adam |", "|---" * (len(keys) + 3) + "|"]
    for contestant in places.sort_values(kind="stable").index:
        own = rows[rows["contestant"] == contestant].set_index("problem")
        cells = [_cell(rows[rows["problem"] == key], contestant) for key in keys]
        spans = [span(own["step / Adam"]), span(own["state / Adam"])]
        name = f"**{contestant}**" if contestant == HERO else contestant
        lines.append(f"| {' | '.join([name, *cells, *spans])} |")
    constant = rows.groupby("problem")["constant answer"].first()
    lines.append(f"| best constant answer | {' | '.join(f'{constant[key]:.4g}' for key in keys)} | | |")
    fewest, most = rows["seeds"].min(), rows["seeds"].max()
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return "\n".join([*lines, "", f"Means over {seeds} judged seeds.", *verdicts(frame)])


def verdicts(frame: pd.DataFrame) -> list[str]:
    """The default against the best peer on every problem, and against its own tuning, in sentences."""
    sentences = []
    shown = frame[frame["method"].isin(METHODS) & frame["problem"].isin(finalists(frame)["problem"])]
    for contest, under in (("free", "every schedule allowed"), ("constant", "everyone at a constant rate")):
        table = against_peers(shown, contest)
        if not table.empty:
            clear = sum(row["ratio"] < 1 and (row["p, Holm"] or 1.0) < 0.05 for _, row in table.iterrows())
            behind = sum(row["ratio"] > 1 and (row["p, Holm"] or 1.0) < 0.05 for _, row in table.iterrows())
            sentences.append(
                f"With {under}, the default's loss is {table['ratio'].min():.2f} to {table['ratio'].max():.2f} times "
                f"the best peer's over {len(table)} problems: lower on {(table['ratio'] < 1).sum()}, certainly "
                f"(Holm's p < 0.05) on {clear}; certainly higher on {behind}."
            )
        own = against_tuned(shown, contest)
        if not own.empty:
            sentences.append(
                f"Against its own best rate and schedule there it is {own['ratio'].min():.2f} to "
                f"{own['ratio'].max():.2f}."
            )
    return sentences


def _cell(part: pd.DataFrame, contestant: str) -> str:
    own = part[part["contestant"] == contestant]
    if own.empty:
        return "-"
    row = own.iloc[0]
    if pd.isna(row["train loss"]) or math.isinf(row["train loss"]):
        return "diverged"
    best = part.loc[part["train loss"].idxmin()]
    text = f"{row['train loss']:.4g}"
    return f"**{text}**" if row["train low"] <= best["train high"] else text


def span(values: pd.Series) -> str:
    """Smallest to largest, or the one value there is."""
    low, high = (f"{value:.2f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def updated(frame: pd.DataFrame) -> str:
    """README's text with the table of `frame` and those of the GPU between their markers.

    Raises:
        ValueError: if README lacks a marker.
    """
    text = README.read_text(encoding="utf-8")
    for begin, content in ((BEGIN, table(frame)), (GPU, gpu.table() or "Not measured yet.")):
        if begin not in text or END not in text.partition(begin)[2]:
            raise ValueError(
                f"{README} must hold the lines {begin!r} and, after it, {END!r}: a table goes between them"
            )
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{content}\n{END}{rest.partition(END)[2]}"
    return text
