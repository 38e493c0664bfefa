"""Whether a step is to be taken at all: finite gradients and loss, without asking the host; and a word if not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.statistics import Record
from kfqn_core.training.answer import Answer
from kfqn_core.training.plan import Plan

SKIPS = 20  # steps skipped in a row after which a warning says so
EVERY = 10  # steps between two questions to a device


def all_finite(params: Sequence[nn.Parameter], loss: Any, found_inf: Tensor | None, device: torch.device) -> Tensor:
    """Bool scalar on `device`: whether the gradients of `params` are finite, the loss is, and no infinity was found."""
    gradients: dict[Any, list[Tensor]] = {}
    for p in params:
        assert p.grad is not None
        gradients.setdefault((p.grad.device, p.grad.dtype), []).append(p.grad)
    # By their largest entries: a sum of squares may overflow.
    flags = [
        (torch.stack(torch._foreach_norm(of, torch.inf)) < torch.inf).all().to(device) for of in gradients.values()
    ]
    if isinstance(loss, Tensor):
        flags.append(torch.isfinite(loss.detach()).all().to(device))
    elif isinstance(loss, float):
        flags.append(torch.tensor(math.isfinite(loss), device=device))
    if found_inf is not None:
        flags.append((found_inf == 0).all().to(device))
    if not flags:
        return torch.ones((), dtype=torch.bool, device=device)
    return flags[0] if len(flags) == 1 else torch.stack(flags).all()


class Skips:
    """Counts steps that were not taken, and says so once after twenty in a row.

    Attributes:
        counts: int64 `[2]`: of all skipped steps, and of those in a row up to now.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._answer: Answer | None = None
        self._said = False

    def count(self, finite: Tensor) -> None:
        """A step is taken where `finite` holds."""
        skipped = ~finite
        self.counts.add_(skipped)
        self.counts[1].mul_(skipped)

    def warn(self, step: int) -> None:
        """Ask now and then, and warn when the answer is there."""
        if self._answer is None and not self._said and (self.counts.device.type == "cpu" or step % EVERY == 0):
            self._answer = Answer(self.counts >= SKIPS)
        known = self._answer and self._answer.known()
        if not known:
            return
        self._answer = None
        if known[1]:
            self._said = True
            warnings.warn(
                f"the last {SKIPS} steps or more had a loss or gradient that is not finite, and changed nothing: look "
                "at the loss, lower the rate, or scale the loss less (GradScaler); skipped_steps counts them",
                stacklevel=5,
            )


def unscale(plan: Plan, records: Mapping[str, Record], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Take the scale of a `GradScaler` out of gradients and statistics.

    Args:
        plan: whose gradients are divided by the scale, in place.
        records: whose gradients are as they were in backward.
        grad_scale: of the loss; None if the gradients have been unscaled, or never were scaled.
        found_inf: given by the scaler, and None without one.
    """
    if grad_scale is not None:
        for p in plan.moving():
            assert p.grad is not None
            p.grad.div_(grad_scale.to(p.grad.device))
        for record in records.values():
            record.scale = grad_scale
    elif found_inf is not None:
        # The user has unscaled, and perhaps clipped, what backward left: so are the statistics, by the same factor.
        for name, record in records.items():
            before, now = plan.hooks[name].gradient_size, plan.layer(name).weight.grad
            if before is not None and now is not None:
                record.scale = before / torch.linalg.vector_norm(now)
