"""How good: the MNIST autoencoder of the papers, in time to the losses that their authors' public code reached.

Rates are chosen on seed 0 over ten epochs, and judged on seeds 1 and 2. The data lie on the device; evaluations are not
timed, the capture of graphs is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.fast import captured, fused_adam
from benchmarks.methods import METHODS, muon
from benchmarks.problems import TASKS
from kfqn_core import KFQN, capture, presets
from kfqn_core.lab.problems import Problem, digits_autoencoder
from kfqn_core.lab.training import linear

__all__ = ["SAYS", "measure"]

SAYS = "MNIST autoencoder to the losses of the published K-BFGS: time to target for KFQN, K-BFGS 2020, Adam, Muon, SOAP"
# Training loss after ten and after 120 epochs, from the log in the authors' repository (K-BFGS, lr 0.3, lambda 0.3).
TARGETS = (59.8, 52.4)
EPOCHS, LONG = 10, 120


@dataclass(frozen=True)
class Contestant:
    """A method with the rates to choose from; `graphed` where its step can be a CUDA graph with a rate that changes."""

    name: str
    make: Callable[[nn.Module, Any], Any]
    rates: tuple[float, ...]
    graphed: bool = False
    schedule: bool = True
    warm_start: bool = False


CONTESTANTS = (
    Contestant("kfqn", lambda model, lr: KFQN(model, lr), (0.01, 0.03, 0.1), graphed=True),
    Contestant("adam", lambda model, lr: fused_adam(model, lr), (0.001, 0.003, 0.01), graphed=True),
    Contestant("muon", muon, (0.003, 0.01, 0.03)),
    Contestant("soap", lambda model, lr: METHODS["soap"].constructor(model, lr, **METHODS["soap"].settings),
               (0.003, 0.01)),
    Contestant("K-BFGS 2020", lambda model, lr: KFQN(model, lr, **{**presets.KBFGS_2020, "damping": 0.3}),
               (0.3,), schedule=False, warm_start=True),
)  # fmt: skip


def measure(write: Callable[[dict[str, Any]], None], real: bool) -> None:
    """A line for every run, the short ones first."""
    try:
        problem = TASKS["P8"].problem if real else digits_autoencoder()
    except ConnectionError as error:
        write({"left out": str(error)})
        return
    device = torch.device("cuda" if real else "cpu")
    for name in ("x_train", "y_train", "x_test", "y_test"):
        object.__setattr__(problem, name, getattr(problem, name).to(device))
    epochs = (EPOCHS, LONG) if real else (1, 2)
    for contestant in CONTESTANTS:
        runs = {lr: _run(problem, contestant, lr, epochs[0], seed=0) for lr in contestant.rates}
        for run in runs.values():
            write(run)
        best = chosen(runs)
        for seed in (1, 2):
            write(_run(problem, contestant, best, epochs[0], seed))
        if contestant.graphed:
            write(_run(problem, contestant, best, epochs[0], seed=1, graphed=False))
            write(_run(problem, contestant, best, epochs[1], seed=1))


def chosen(runs: Mapping[float, Mapping[str, Any]]) -> float:
    """The rate whose run ended with the lowest loss; one whose loss is no number comes last."""
    ends = {lr: run["loss"][-1] for lr, run in runs.items()}
    return min(ends, key=lambda lr: (math.isnan(ends[lr]), ends[lr]))


def _run(
    problem: Problem, contestant: Contestant, lr: float, epochs: int, seed: int, *, graphed: bool | None = None
) -> dict[str, Any]:  # fmt: skip
    model = problem.model(seed).to(problem.x_train.device)
    on_gpu = problem.x_train.is_cuda
    graphed = on_gpu and contestant.graphed if graphed is None else graphed
    optimizer = contestant.make(model, torch.tensor(lr, device="cuda") if graphed else lr)
    x, y = (part[: problem.batch_size].clone() for part in (problem.x_train, problem.y_train))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model(x), y)
        loss.backward()
        return loss

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    def eager() -> Tensor:
        return optimizer.step(closure)

    step, steps = eager, len(problem.x_train) // problem.batch_size
    seconds, curve = 0.0, [(0.0, _loss(model, problem))]
    wait()
    start = time.perf_counter()
    if contestant.warm_start:
        optimizer.warm_start(problem.x_train.split(problem.batch_size))
    if graphed:
        _set_rate(optimizer, 0.0)  # the steps that a capture begins with move nothing
        step = capture(optimizer, closure) if isinstance(optimizer, KFQN) else captured(eager)
    for done, indices in enumerate(_orders(problem, epochs, seed), start=1):
        if contestant.schedule:
            _set_rate(optimizer, lr * linear(done / (epochs * steps + 1)))
        torch.index_select(problem.x_train, 0, indices, out=x)
        torch.index_select(problem.y_train, 0, indices, out=y)
        step()
        if done % steps == 0:
            wait()
            seconds += time.perf_counter() - start
            curve.append((seconds, _loss(model, problem)))
            wait()
            start = time.perf_counter()
    times, losses = zip(*curve, strict=True)
    return {
        "method": contestant.name, "mode": "eager" if step is eager else "graph", "lr": lr, "seed": seed,
        "epochs": epochs, "test loss": _loss(model, problem, test=True),
        **{f"seconds to {target}": next((at for at, loss in curve if loss <= target), None) for target in TARGETS},
        "seconds": list(times), "loss": list(losses),
    }  # fmt: skip


def _orders(problem: Problem, epochs: int, seed: int) -> Iterator[Tensor]:
    """Mini-batches of every epoch, as `lab.training.batches` draws them, on the device."""
    generator = torch.Generator().manual_seed(seed)
    size = problem.batch_size
    for _ in range(epochs):
        order = torch.randperm(len(problem.x_train), generator=generator).to(problem.x_train.device)
        yield from order[: len(order) // size * size].split(size)


def _set_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


@torch.no_grad()
def _loss(model: nn.Module, problem: Problem, *, test: bool = False) -> float:
    x, y = (problem.x_test, problem.y_test) if test else (problem.x_train, problem.y_train)
    parts = zip(x.split(problem.batch_size), y.split(problem.batch_size), strict=True)
    return float(sum(problem.loss(model(a), b) * len(a) for a, b in parts) / len(x))
