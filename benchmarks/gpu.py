"""Step costs at sizes where a GPU has something to do: against fused Adam and Muon, and against the floors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.flops import floor_ratio, shapes
from benchmarks.methods import METHODS, Method, state_bytes
from benchmarks.records import RESULTS, environment, rounded
from benchmarks.timing import Ratio, mean_interval, paired_ratios, parts_of
from kfqn_core import KFQN
from kfqn_core.lab.networks import residual_network
from kfqn_core.lab.problems import autoencoder, pixel_cross_entropy

__all__ = ["CASES", "Case", "main"]

CONTESTANTS = ("kfqn", "kfqn-5", "muon", "adam")
STEPS_PER_TURN = 20  # a multiple of every period above
STEPS = 200  # of a run, over which the kinds of steps of the default are put together


@dataclass(frozen=True)
class Case:
    """A model at a size that papers use, on noise: only the cost of a step is of interest."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    classes: int | None
    batch: int


def wide_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(),
        nn.Linear(4096, 10),
    )  # fmt: skip


CASES = (
    Case("MNIST autoencoder 784-1000-500-250-30", lambda: autoencoder((784, 1000, 500, 250, 30)), (784,), None, 1000),
    Case("FACES autoencoder 625-2000-1000-500-30", lambda: autoencoder((625, 2000, 1000, 500, 30)), (625,), None, 1000),
    Case("CURVES autoencoder", lambda: autoencoder((784, 400, 200, 100, 50, 25, 6)), (784,), None, 1000),
    Case("ResNet-32", lambda: residual_network(blocks=5), (3, 32, 32), 10, 128),
    Case("MLP of width 4096", wide_network, (4096,), 10, 1024),
)


def main(arguments: argparse.Namespace) -> int:
    """Measure on the first GPU and write `results/gpu.json`; without one, say what would be measured."""
    if not torch.cuda.is_available():
        print("no GPU here. With one, this measures a step of " + ", ".join(CONTESTANTS) + " (Adam fused) on:")
        for case in CASES:
            print(f"  {case.name}, batch {case.batch}")
        return 0
    rows = []
    for case in CASES:
        rows += _measure(case)
        for row in rows[-len(CONTESTANTS) :]:  # as soon as it is known
            print(json.dumps(row))
    (RESULTS / "gpu.json").write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return 0


def _measure(case: Case) -> list[dict[str, Any]]:
    parts = {name: parts_of(METHODS[name], STEPS) for name in CONTESTANTS}
    made = {part: _stepper(case, method) for of_one in parts.values() for part, (method, _) in of_one.items()}
    of_parts = paired_ratios(
        {part: step for part, (step, _) in made.items()}, dict.fromkeys(made, STEPS_PER_TURN),
        wait=torch.cuda.synchronize, label=case.name,
    )  # fmt: skip
    seconds = {
        name: sum(weight * of_parts[part] for part, (_, weight) in of_one.items()) for name, of_one in parts.items()
    }
    layers = shapes(case.make().cuda(), torch.randn(case.batch, *case.inputs, device="cuda"))
    parameters = 4 * sum(p.numel() for p in case.make().parameters())
    rows = []
    for name in CONTESTANTS:
        method, (_, optimizer) = METHODS[name], made[next(iter(parts[name]))]
        held = state_bytes(optimizer)
        settings = dict(method.settings)
        if method.constructor is KFQN:
            settings["refresh"] = mean_interval(method, STEPS)
        rows.append(rounded({
            "case": case.name, "method": name, "milliseconds": float(np.median(seconds[name]) * 1e3),
            "to Adam": vars(Ratio.of(seconds[name] / seconds["adam"])),
            "to Muon": vars(Ratio.of(seconds[name] / seconds["muon"])),
            "flop floor": floor_ratio(name, settings, layers),
            # Optimizer alone: state is read and written once; gradient and parameters read, parameters written.
            "byte floor to Adam": (2 * held + 3 * parameters) / (2 * state_bytes(made["adam"][1]) + 3 * parameters),
            "state to Adam": held / state_bytes(made["adam"][1]),
        }))  # fmt: skip
    return rows


def _stepper(case: Case, method: Method) -> tuple[Callable[[], None], Any]:
    torch.manual_seed(0)
    model = case.make().cuda()
    x = torch.rand(case.batch, *case.inputs, device="cuda")
    y = x if case.classes is None else torch.randint(case.classes, (case.batch,), device="cuda")
    loss_fn = pixel_cross_entropy if case.classes is None else cross_entropy
    lr = 1e-4
    if method.name == "adam":
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    else:
        optimizer = method.constructor(model, lr, **method.settings)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        optimizer.step(closure)

    for _ in range(STEPS_PER_TURN):
        step()
    return step, optimizer
