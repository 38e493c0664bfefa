"""The table of step costs: measured, counted by torch, and the floor that shapes alone give."""

from __future__ import annotations

import argparse
import ctypes
import platform

import torch

from benchmarks.counting import count
from benchmarks.flops import floor_ratio, shapes
from benchmarks.methods import METHODS, state_bytes
from benchmarks.problems import TASKS, Task, available
from benchmarks.timing import mean_interval, step_cost, stepper
from kfqn_core import describe
from kfqn_core.training.optimizer import KFQN

__all__ = ["described_bytes", "keep_memory", "step_cost_table"]

HEADER = ("problem", "method", "time / SGD", "95 % interval", "floor", "counted", "time / floor", "time / Adam",
          "state / Adam", "as described")  # fmt: skip


def described_bytes(task: Task, name: str) -> int | None:
    """State bytes that `describe` promises for a configuration of KFQN; None for other methods."""
    method = METHODS[name]
    if method.constructor is not KFQN:
        return None
    return describe(task.problem.model(seed=0), **method.settings).state_bytes


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where glibc would return it to the system.

    Which it does with large tensors, by thresholds that adapt; their pages then come back empty, one interrupt each. Of
    two runs of the same convolutional step one may have ten thousand of these and the other none.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_threshold, 2**25)  # the largest that glibc accepts


def step_cost_table(arguments: argparse.Namespace) -> int:
    """Print the table. Nothing is stored: it is the state of the code, not a result."""
    keep_memory()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")
    _print(HEADER)
    for key in available(arguments.problems):
        task = TASKS[key]
        layers = shapes(task.problem.model(seed=0), task.problem.x_train[: task.problem.batch_size])
        step, _ = stepper(task, METHODS["sgd"])
        sgd = count(step).flops
        for name in arguments.methods:
            method = METHODS[name]
            try:
                cost = step_cost(task, name, turns=arguments.turns)
                step, optimizer = stepper(task, method)
                counted = count(step, method.period).flops / sgd
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                _print((key, name, f"fails: {type(error).__name__}: {error}"))
                continue
            least = floor_ratio(name, {**method.settings, "refresh": mean_interval(method, task.steps)}, layers)
            promised = described_bytes(task, name)
            _print((
                key, name, f"{cost.to_sgd.value:.2f}", f"{cost.to_sgd.low:.2f} to {cost.to_sgd.high:.2f}",
                "-" if least is None else f"{least:.2f}", f"{counted:.2f}",
                "-" if least is None else f"{cost.to_sgd.value / least:.2f}", f"{cost.to_adam.value:.2f}",
                f"{cost.bytes_to_adam:.2f}",
                "-" if promised is None else "yes" if promised == state_bytes(optimizer) else f"no: {promised} B",
            ))  # fmt: skip
    return 0


def _print(cells: tuple[str, ...]) -> None:
    """One line, as soon as it is known."""
    widths = (7, 18, 10, 13, 5, 7, 12, 11, 12, 12)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip(), flush=True)
