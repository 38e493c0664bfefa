"""A training step as CUDA graphs: the launches of forward, backward and optimizer without the host.

A step that updates curvature and one that does not are two sequences of launches. Each is recorded when it first comes
up, and played from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kfqn_core.training.checkpoint import COUNTERS, LATE, SHARE
from kfqn_core.training.options import refreshes

if TYPE_CHECKING:
    from kfqn_core.training.optimizer import KFQN

WARM_UP = 3  # steps without a graph: libraries set themselves up, and first estimates are made


def capture(optimizer: KFQN, closure: Callable[[], Tensor]) -> CapturedStep:
    """`optimizer.step(closure)` as CUDA graphs: call what is returned once for each mini-batch.

        x, y = torch.empty(128, 784, device="cuda"), torch.empty(128, dtype=torch.long, device="cuda")
        step = kfqn_core.capture(optimizer, closure)  # the closure reads x and y
        for batch in loader:
            x.copy_(batch[0])
            y.copy_(batch[1])
            loss = step()  # until the next call; a graph writes it to the same place every time

    Args:
        optimizer: whose model is on a CUDA device, without `pairs="second_pass"`. Where the rate follows a schedule it
            must be a tensor on that device, `KFQN(model, lr=torch.tensor(0.03, device="cuda"))`, which a schedule of
            torch changes in place.
        closure: as for `step`: clears the gradients, computes the loss, calls backward, returns the loss. What it
            reads must lie in the same memory at every call, and it may not wait for the device.

    Raises:
        TypeError: for something else than a KFQN.
        ValueError: if the optimizer cannot be captured.
    """
    return CapturedStep(optimizer, closure)


class CapturedStep:
    """See `capture`."""

    def __init__(self, optimizer: KFQN, closure: Callable[[], Tensor]):
        if not hasattr(optimizer, "plan"):
            raise TypeError(f"capture takes a KFQN, not {type(optimizer).__name__}: capture(optimizer, closure)")
        devices = {group.started.device for group in optimizer.plan.layer_groups}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            found = ", ".join(sorted(map(str, devices))) or "no device"
            raise ValueError(
                f"a CUDA graph needs all layers on one CUDA device, and they are on {found}: move the model"
            )
        if optimizer.plan.options.pairs == "second_pass":
            raise ValueError(
                'pairs="second_pass" saves and restores random states on the host, which a CUDA graph cannot hold: '
                'call optimizer.step(closure), or use pairs=None or "next_batch"'
            )
        if not optimizer.ranks.alone or optimizer.plan.sharded:
            raise ValueError("a step of several processes is not captured: call optimizer.step(closure)")
        self._optimizer, self._closure = optimizer, closure
        self._device = next(iter(devices))
        for group in optimizer.param_groups:
            for name in ("lr", "fallback_lr"):
                if isinstance(group[name], Tensor) and group[name].device != self._device:
                    raise ValueError(
                        f"a CUDA graph reads {name} on the device of the layers, {self._device}, and it is on "
                        f"{group[name].device}: it would keep its present value for ever"
                    )
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._called = 0
        self._settings: list[dict[str, Any]] | None = None

    def __call__(self) -> Tensor:
        """One step; the loss before it.

        Raises:
            RuntimeError: if the model or a setting of the optimizer is no longer what was captured.
        """
        self._called += 1
        if self._called <= WARM_UP:
            return self._eagerly()
        self._require_unchanged()
        optimizer = self._optimizer
        updates = refreshes(optimizer.history.steps, optimizer.plan.options.refresh)
        if updates not in self._graphs:
            self._graphs[updates] = self._recorded(updates)
            self._graphs[updates][0].replay()
        else:
            self._graphs[updates][0].replay()
            optimizer.advance()
        return self._graphs[updates][1]

    def _eagerly(self) -> Tensor:
        """On a stream of its own, as the libraries that will be captured want it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._optimizer.step(self._closure)
        current.wait_stream(self._stream)
        return loss

    def _recorded(self, updates: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of the step that comes next, one that `updates` curvature or not, and where it writes the loss."""
        optimizer = self._optimizer
        torch.cuda.synchronize(self._device)  # once: what was asked of the device is known now
        optimizer.plan.watch(updates, every_step=optimizer.pairs.every_step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = optimizer.step(self._closure)
        return graph, loss

    def _require_unchanged(self) -> None:
        optimizer = self._optimizer
        now = [
            {
                key: id(value) if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key not in UNREAD
            }
            for group in optimizer.param_groups
        ]  # of a tensor which one it is: its value may change, and a graph reads it
        if self._settings is None:
            self._settings = now
        if now != self._settings or not optimizer.plan.holds(optimizer.param_groups):
            raise RuntimeError(
                "the model, or a setting of a parameter group, is no longer what was captured: capture anew, and give "
                'a rate that follows a schedule as a tensor, KFQN(model, lr=torch.tensor(0.03, device="cuda"))'
            )


UNREAD = frozenset({"params", "param_names", "initial_lr", *COUNTERS, SHARE, LATE})  # of a group: no step reads them
