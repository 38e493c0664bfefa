"""Whether a step is to be taken at all: finite gradients and loss, without asking the host; and a word if not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kfqn_core.estimate.statistics import Record
from kfqn_core.layers.view import dtype_of_sums
from kfqn_core.parallel.shards import local
from kfqn_core.training.answer import Answer
from kfqn_core.training.plan import Plan

if TYPE_CHECKING:
    from kfqn_core.training.optimizer import KFQN

SKIPS = 20  # steps skipped in a row after which a warning says so
EVERY = 10  # steps between two questions to a device


def look_at_gradients(
    optimizer: KFQN, moving: Sequence[nn.Parameter], records: Mapping[str, Record], loss: Any
) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """`all_finite` of a step; the statistics learn what has become of the gradients since backward.

    Args:
        optimizer: that takes it; a `GradScaler` has left there what it knows.
        moving: the parameters with a gradient.
        records: of what was seen.
        loss: of the closure.
    """
    plan = optimizer.plan
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    note_scale(plan, records, scale, found_inf)
    finite, lengths = all_finite(moving, loss, scale, found_inf, optimizer.skips.counts.device)
    for name, record in records.items():
        record.size_now = lengths.get(plan.layer(name).weight)
    return finite, lengths


def all_finite(
    params: Sequence[nn.Parameter], loss: Any, grad_scale: Tensor | None, found_inf: Tensor | None, device: torch.device
) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """Whether a step is to be taken; gradients are freed of the scale of the loss on the way.

    Args:
        params: all have a gradient.
        loss: of the closure; looked at if it is a tensor or a number.
        grad_scale: by which the gradients are divided, in place; None leaves them as they are.
        found_inf: what a `GradScaler` has found; None without one.
        device: of the answer.

    Returns:
        Bool scalar: whether all gradients are finite, the loss is, and no infinity was found. And the lengths of the
        gradients, scalars by parameter; of a shard that of its rows.
    """
    gradients: dict[Any, list[Tensor]] = {}
    owners: dict[Any, list[nn.Parameter]] = {}
    lengths: dict[nn.Parameter, Tensor] = {}
    for p in params:
        assert p.grad is not None
        own = local(p.grad)
        grad = torch.view_as_real(own) if own.is_complex() else own
        key = grad.device, grad.dtype
        gradients.setdefault(key, []).append(grad)
        owners.setdefault(key, []).append(p)
    flags = [] if found_inf is None else [(found_inf == 0).all().to(device)]
    for (where, dtype), of in gradients.items():
        if grad_scale is not None:  # by GradScaler's own operation
            inverse = grad_scale.to(where).double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(of, torch.zeros((), device=where), inverse)
        # Of half precision in float32, whose squares do not overflow. Where those of float32 do, no direction would be
        # finite either.
        norms = torch._foreach_norm(of, 2, dtype=dtype_of_sums(of[0]))
        lengths.update(zip(owners[where, dtype], norms, strict=True))
        flags.append((torch.stack(norms) < torch.inf).all().to(device))
    if isinstance(loss, Tensor):
        flags.append(torch.isfinite(loss.detach()).all().to(device))
    elif isinstance(loss, float):
        flags.append(torch.full((), math.isfinite(loss), device=device))
    if not flags:
        return torch.ones((), dtype=torch.bool, device=device), lengths
    return flags[0] if len(flags) == 1 else torch.stack(flags).all(), lengths


class Skips:
    """Counts steps that were not taken, and says so once after twenty in a row.

    Attributes:
        counts: int64 `[2]`: of all skipped steps, and of those in a row up to now.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._answer: Answer | None = None
        self._said = False

    def follow(self, device: torch.device) -> None:
        """Go where the parameters have gone."""
        if self.counts.device != device:
            self.counts = (
                torch.zeros(2, dtype=torch.int64, device=device) if self.counts.is_meta else self.counts.to(device)
            )

    def count(self, finite: Tensor) -> None:
        """A step is taken where `finite` holds."""
        skipped = ~finite
        self.counts.add_(skipped)
        self.counts[1].mul_(skipped)

    def warn(self, step: int) -> None:
        """Ask now and then, and warn when the answer is there."""
        if self.counts.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph has no host to answer
        if self._answer is None and not self._said and (self.counts.device.type == "cpu" or step % EVERY == 0):
            self._answer = Answer(self.counts)
        known = self._answer and self._answer.known()
        if not known:
            return
        self._answer = None
        if known[1] >= SKIPS:
            self._said = True
            warnings.warn(
                f"the last {SKIPS} steps or more had a loss or gradient that is not finite, and changed nothing: look "
                "at the loss, lower the rate, or scale the loss less (GradScaler); skipped_steps counts them",
                stacklevel=6,
            )


def note_scale(
    plan: Plan, records: Mapping[str, Record], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:  # fmt: skip
    """Tell the statistics what a `GradScaler` has multiplied the gradients in backward by.

    Args:
        plan: that holds the layers.
        records: whose gradients are as they were in backward.
        grad_scale: of the loss; None if the gradients have been unscaled, or never were scaled.
        found_inf: given by the scaler, and None without one.
    """
    for name, record in records.items() if found_inf is not None else ():
        if grad_scale is not None:
            record.scale = grad_scale
            continue
        if plan.sharded:
            raise RuntimeError(
                "what backward left of sharded gradients is not known after GradScaler.unscale_, and the pairs of H_g "
                "need it: leave unscaling to GradScaler.step, use bfloat16 without a scaler, or pairs=None"
            )
        # The user has unscaled, and perhaps clipped, what backward left: so are the statistics, by the same factor.
        now = plan.layer(name).weight.grad
        if record.size_then is not None and now is not None:
            record.scale = record.size_then / torch.linalg.vector_norm(now)
