"""One training loop for every optimizer, so that a comparison differs in the optimizer and in nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from kfqn_core.lab.problems import Problem

__all__ = ["accuracy", "batches", "cosine", "evaluate", "last_fifth", "linear", "make_closure", "train"]

WARM_UP = 0.02  # of the run


def batches(problem: Problem, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Mini-batches without end: each epoch in a new random order that `seed` alone fixes, the remainder dropped."""
    size = problem.batch_size
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(problem.x_train), generator=generator)
        for indices in order[: len(order) // size * size].split(size):
            yield problem.x_train[indices], problem.y_train[indices]


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem) -> tuple[float, float]:
    """The mean loss over all training samples and over all test samples, in evaluation mode."""
    was_training = model.training
    model.eval()
    losses = []
    for x, y in ((problem.x_train, problem.y_train), (problem.x_test, problem.y_test)):
        parts = zip(x.split(1000), y.split(1000), strict=True)
        losses.append(sum(problem.loss(model(a), b).item() * len(a) for a, b in parts) / len(x))
    model.train(was_training)
    return losses[0], losses[1]


@torch.no_grad()
def accuracy(model: nn.Module, problem: Problem) -> float:
    """The share of test labels that get the highest score, in evaluation mode."""
    was_training = model.training
    model.eval()
    parts = zip(problem.x_test.split(1000), problem.y_test.split(1000), strict=True)
    right = sum((model(x).argmax(-1) == y).sum().item() for x, y in parts)
    model.train(was_training)
    return right / problem.y_test.numel()


def _quality(model: nn.Module, problem: Problem) -> dict[str, float]:
    """The columns that `train` records unless it is told what to measure."""
    train_loss, test_loss = evaluate(model, problem)
    losses = {"train loss": train_loss, "test loss": test_loss}
    return losses if problem.y_test.is_floating_point() else {**losses, "test accuracy": accuracy(model, problem)}


def cosine(progress: float) -> float:
    """A schedule: from 0 to 1 over the first 2 % of the run, then down to 0 along half a cosine."""
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def linear(progress: float) -> float:
    """A schedule: from 0 to 1 over the first 2 % of the run, then down to 0 along a straight line."""
    return min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))


def last_fifth(progress: float) -> float:
    """A schedule: from 0 to 1 over the first 2 % of the run, then constant, and down to 0 along its last fifth."""
    return min(progress / WARM_UP, 1.0, (1 - progress) / 0.2)


def make_closure(
    problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], Any]:
    """What `optimizer.step` takes: clears the gradients, differentiates the loss of this mini-batch, and returns it."""

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model(x), y)
        loss.backward()
        return loss

    return closure


def train(
    problem: Problem,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
    seed: int,
    *,
    eval_every: int = 25,
    warm_start: bool = False,
    schedule: Callable[[float], float] | None = None,
    model: nn.Module | None = None,
    measure: Callable[[nn.Module], dict[str, float]] | None = None,
    label: str = "train",
) -> pd.DataFrame:
    """Train for `steps` mini-batches and record the losses.

    `make_optimizer(model)` builds the optimizer. Each step calls `optimizer.step(closure)` once, where the closure
    clears the gradients, evaluates the loss on this step's mini-batch, and differentiates it; an optimizer may call it
    again. The seed fixes the initial weights and the order of the data, the same for every optimizer.
    `warm_start=True` first hands one epoch of inputs to `optimizer.warm_start`. `schedule` gives the factor of every
    learning rate at step k of n as a function of k / (n + 1), for instance `cosine`. Pass `model` to train that one, in
    place. `measure(model)` replaces the columns that follow `seconds`; it must not change the model.

    Returns a frame with a row before the first step, one every `eval_every` steps, and one after the last: `step`,
    `epoch`, `seconds` (wall time of the steps and of the warm start, evaluation excluded), `train loss` and
    `test loss` over all samples, and for a problem with class labels `test accuracy`. A loss that is not finite ends
    the run with a message, which `frame.attrs["stopped"]` keeps; the rows up to there remain.
    """
    for name, value in (("steps", steps), ("eval_every", eval_every)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"train: {name} must be a positive integer, got {value!r}")
    if len(problem.x_train) < problem.batch_size:
        raise ValueError(f"train: batch size {problem.batch_size} exceeds the {len(problem.x_train)} training samples")
    model = problem.model(seed) if model is None else model
    optimizer = make_optimizer(model)
    steps_per_epoch = len(problem.x_train) // problem.batch_size
    measure = (lambda model: _quality(model, problem)) if measure is None else measure
    rows: list[dict[str, float]] = []
    learning_rates = [group["lr"] for group in optimizer.param_groups]
    stopped = ""
    seconds = 0.0

    def record(step: int) -> None:
        rows.append({"step": step, "epoch": step / steps_per_epoch, "seconds": seconds, **measure(model)})

    record(0)
    if warm_start:
        start = time.perf_counter()
        optimizer.warm_start(problem.x_train.split(problem.batch_size))  # type: ignore[attr-defined]
        seconds += time.perf_counter() - start

    stream = batches(problem, seed)
    with tqdm(range(1, steps + 1), desc=label, leave=False) as bar:
        for step in bar:
            if schedule is not None:
                for group, lr in zip(optimizer.param_groups, learning_rates, strict=True):
                    group["lr"] = lr * schedule(step / (steps + 1))
            closure = make_closure(problem, model, optimizer, *next(stream))
            start = time.perf_counter()
            loss = torch.as_tensor(optimizer.step(closure)).item()
            seconds += time.perf_counter() - start
            if not math.isfinite(loss):
                stopped = f"{label}: the loss is {loss} at step {step}; stopped (a smaller learning rate may help)"
                tqdm.write(stopped)
                break
            if step % eval_every == 0 or step == steps:
                record(step)
                bar.set_postfix_str(f"train loss {rows[-1]['train loss']:.2f}" if "train loss" in rows[-1] else "")
    frame = pd.DataFrame(rows).astype({"step": int})
    if stopped:
        frame.attrs["stopped"] = stopped
    return frame
