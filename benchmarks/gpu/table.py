"""The results of `script` as tables."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.gpu.good import EPOCHS, LONG, TARGETS
from benchmarks.records import RESULTS

__all__ = ["FILE", "table"]

FILE = RESULTS / "gpu.jsonl"
STEPS = 60  # of an epoch of MNIST, in mini-batches of 1000
PEERS = ("adam", "muon", "soap", "kfqn")
HEADER = "| a step in ms, eager / CUDA graph | " + " | ".join(("Adam (fused)", "Muon", "SOAP", "**KFQN**")) + " |"


def table(file: Path = FILE) -> str:
    """What README shows of a file of results: steps, then the run to a target; empty for a rehearsal's or none."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    environments = [line for line in lines if line["part"] == "environment"]
    if not environments or any(line["rehearsal"] for line in environments):
        return ""
    right = next(line for line in lines if "passed" in line)
    devices = " and ".join(sorted({line["device"] for line in environments}))
    failed = f"{len(right['failed'])} failed" if right["failed"] else "none failed"
    return "\n".join([
        f"{devices}, torch {environments[0]['packages']['torch']}: {right['passed']} tests passed, {failed}.", "",
        *_steps(lines), "", *_runs(lines),
    ])  # fmt: skip


def _steps(lines: list[dict[str, Any]]) -> list[str]:
    rows = [HEADER, "|---" * (len(PEERS) + 1) + "|"]
    for line in lines:
        if "rows" in line:
            cells = [
                " / ".join(_milliseconds(line["rows"][peer], mode) for mode in ("eager", "graph")) for peer in PEERS
            ]
            rows.append(f"| {line['case']} | {' | '.join(cells)} |")
    return rows


def _milliseconds(row: dict[str, Any], mode: str) -> str:
    return f"{row[f'{mode} ms']:.3g}" if f"{mode} ms" in row else "-"


def _runs(lines: list[dict[str, Any]]) -> list[str]:
    """Rates were chosen on seed 0; what is shown are means over the other seeds."""
    runs = [line for line in lines if "loss" in line and line["seed"] > 0]
    rows = [
        f"| MNIST autoencoder | rate | loss after {EPOCHS} epochs | a step | seconds to {TARGETS[0]} |"
        f" to {TARGETS[1]}, in {LONG} epochs |",
        "|---" * 6 + "|",
    ]
    for method, mode in dict.fromkeys((run["method"], run["mode"]) for run in runs):
        own = [run for run in runs if (run["method"], run["mode"]) == (method, mode)]
        short, long = ([run for run in own if run["epochs"] == epochs] for epochs in (EPOCHS, LONG))
        name = f"**{method.upper()}**" if method == "kfqn" else method
        cells = [
            f"{name}, {mode}", f"{own[0]['lr']:g}", _loss(short),
            f"{mean(run['seconds'][-1] / EPOCHS / STEPS for run in short) * 1e3:.2f} ms",
            _time(short, TARGETS[0]), _time(long, TARGETS[1]) if long else "not run",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _loss(runs: list[dict[str, Any]]) -> str:
    """The mean over the runs that did not diverge, and how many did: whose loss is not a number, or grew."""
    alive = [run["loss"] for run in runs if run["loss"][-1] is not None and run["loss"][-1] < run["loss"][0]]
    diverged = f"{len(runs) - len(alive)} of {len(runs)} diverged"
    if not alive:
        return diverged
    return f"{mean(loss[-1] for loss in alive):.1f}" + (f", {diverged}" if len(alive) < len(runs) else "")


def _time(runs: list[dict[str, Any]], target: float) -> str:
    times = [run[f"seconds to {target}"] for run in runs]
    return "not reached" if None in times else f"{mean(times):.2f}"
