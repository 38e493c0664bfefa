"""Small, deterministic tasks for other people's models: what a mini-batch is, and what training on some of them gives.

Nothing here is downloaded, and no framework is imported.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core import KFQN

BYTES = 128  # token ids of `text`: ASCII
MASK, PAD = 1, 0
LAST = 8  # steps whose mean loss is compared
SOLVED = 0.1  # a loss below this counts as this: how far below says little
ADAM_RATES = (1e-3, 3e-3)


WORDS = {
    "adjective": "small grey quiet honest northern sudden broken distant green patient",
    "noun": "river matrix engine garden teacher window library signal harbour theorem",
    "verb": "follows measures repairs describes crosses remembers supports divides carries answers",
}


def text(length: int = 40_000) -> Tensor:
    """Sentences of a small grammar, as bytes: something to be learnt in spelling, in words and in their order."""
    draw = random.Random(0)
    words = {kind: names.split() for kind, names in WORDS.items()}
    sentences, total = [], 0
    while total < length:
        subject, thing = (f"the {draw.choice(words['adjective'])} {draw.choice(words['noun'])}" for _ in range(2))
        sentences.append(f"{subject} {draw.choice(words['verb'])} {thing}. ")
        total += len(sentences[-1])
    return torch.tensor(list("".join(sentences).encode())[:length])


TEXT = text()


def windows(step: int, samples: int = 16, tokens: int = 32) -> Tensor:
    """Token ids `[samples, tokens]` of mini-batch number `step`."""
    starts = torch.randint(len(TEXT) - tokens, (samples, 1), generator=torch.Generator().manual_seed(step))
    return TEXT[starts + torch.arange(tokens)]


def masked(ids: Tensor, step: int, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Token ids, some of them masked, and labels that are -100 where nothing was masked."""
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step + 10_000)) < share
    return ids.masked_fill(hidden, MASK), ids.masked_fill(~hidden, -100)


def chains(step: int, samples: int = 16, tokens: int = 32, words: int = 32) -> Tensor:
    """Token ids `[samples, tokens]` of which each names the next, but for one in twenty."""
    generator = torch.Generator().manual_seed(step)
    follows = torch.randperm(words, generator=torch.Generator().manual_seed(99))
    stray = torch.randint(words, (tokens, samples), generator=generator)
    keeps = torch.rand(tokens, samples, generator=generator) < 0.95
    ids = [stray[0]]
    for t in range(1, tokens):
        ids.append(torch.where(keeps[t], follows[ids[-1]], stray[t]))
    return torch.stack(ids, dim=1) + 8


def gratings(
    step: int, samples: int = 32, size: int = 32, classes: int = 10, noise: float = 0.7
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Stripes `[samples, 3, size, size]` of any phase and colour, in noise; their direction is the class."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(classes, (samples,), generator=generator)
    angle = (labels * (math.pi / classes)).view(-1, 1, 1)
    phase = torch.rand(samples, 1, 1, generator=generator) * 2 * math.pi
    at = torch.arange(size) * (2 * math.pi * 4 / size)
    waves = torch.sin(at * angle.cos() + at.view(-1, 1) * angle.sin() + phase)  # [samples, size, size]
    colour = torch.rand(samples, 3, 1, 1, generator=generator) + 0.2
    grain = torch.randn(samples, 3, size, size, generator=generator)
    return colour * waves.unsqueeze(1) + noise * grain, labels


@dataclass(frozen=True)
class Task:
    """A model of somebody else's, and the loss of mini-batch number k."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]

    def made(self, seed: int = 0) -> nn.Module:
        """The model, at a random start that depends on the seed alone."""
        torch.manual_seed(seed)
        return self.model()


Make = Callable[[nn.Module], torch.optim.Optimizer]


def adam(lr: float) -> Make:
    """What KFQN replaces."""
    return lambda model: torch.optim.Adam(model.parameters(), lr)


def untuned(model: nn.Module) -> KFQN:
    """KFQN with every default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about coverage, which these tests print
        return KFQN(model)


def train(task: Task, make: Make, steps: int, *, decay: bool = False, seed: int = 0) -> float:
    """The mean loss of the last `LAST` of `steps` steps; every call sees the same mini-batches of its seed."""
    model = task.made(seed)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps) if decay else None
    losses = []
    for k in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, 1000 * seed + k)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
    return statistics.mean(losses[-LAST:])


def step_ratio(task: Task, steps: int = 24, warm: int = 6) -> float:
    """The median cost of a whole step with KFQN over that with Adam (foreach), measured in turns."""
    models = [task.made(), task.made()]
    optimizers: Sequence[torch.optim.Optimizer] = [adam(1e-3)(models[0]), untuned(models[1])]
    times: list[list[float]] = [[], []]
    for k in range(steps):
        for side, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            begun = time.perf_counter()
            optimizer.zero_grad()
            task.loss(model, k).backward()
            optimizer.step()
            times[side].append(time.perf_counter() - begun)
    return statistics.median(b / a for a, b in zip(times[0][warm:], times[1][warm:], strict=True))


def summary(optimizer: KFQN) -> str:
    """The first line of its `repr`: coverage and state."""
    return repr(optimizer).splitlines()[0].removeprefix("KFQN: ")


def compare(task: Task, steps: int) -> dict[str, Any]:
    """KFQN, untuned, against Adam at `ADAM_RATES`: losses at a constant rate and with a linear decay."""
    row: dict[str, Any] = {"model": task.name, "steps": steps, "what": summary(untuned(task.made()))}
    for schedule in ("constant", "decay"):
        decay = schedule == "decay"
        row[schedule] = train(task, untuned, steps, decay=decay)
        row[f"{schedule} Adam"] = {rate: train(task, adam(rate), steps, decay=decay) for rate in ADAM_RATES}
    row["step / Adam"] = step_ratio(task)
    return row


def line(row: Mapping[str, Any]) -> str:
    """A row of `compare` as one line."""
    parts = [f"{row['model']} ({row['steps']} steps; {row['what']}; step {row['step / Adam']:.2f} of Adam's)"]
    for schedule in ("constant", "decay"):
        rates = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in row[f"{schedule} Adam"].items())
        parts.append(f"{schedule}: KFQN {row[schedule]:.4f}, Adam {rates}")
    return " | ".join(parts)


def lead(row: Mapping[str, Any], schedule: str) -> float:
    """KFQN's loss over that of Adam at its better rate, neither of them taken below `SOLVED`."""
    return max(row[schedule], SOLVED) / max(min(row[f"{schedule} Adam"].values()), SOLVED)
