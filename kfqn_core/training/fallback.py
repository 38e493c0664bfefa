"""How parameters move that no factor covers: by Adam, or, as in the papers, by their averaged gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from kfqn_core.parallel.shards import local, shard_like


class Fallback:
    """Adam for the rest of the parameters, with a rate of its own; or heavy-ball momentum at the layers' rate.

    The arithmetic is torch's. Complex parameters move as pairs of real numbers, which is what torch's Adam does.

    Args:
        by_adam: whether parameters move by Adam; else by `lr` times their averaged gradient.

    Attributes:
        state: of each parameter, under torch's names: `step`, `exp_avg`, `exp_avg_sq`; or `M`.
    """

    def __init__(self, *, by_adam: bool):
        self.by_adam = by_adam
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    @property
    def how(self) -> str:
        """In words: by what, and at which rate."""
        return "by Adam at fallback_lr" if self.by_adam else "by its averaged gradient at lr"

    def adopt(self, p: nn.Parameter, device: torch.device | None = None) -> None:
        """Allocate the state of a parameter, or let what there is follow it to its device (or `device`) and dtype."""
        if p not in self.state or any(value.is_meta for value in self.state[p].values()):
            device, own = device or p.device, local(p.detach())
            names = ("exp_avg", "exp_avg_sq") if self.by_adam else ("M",)
            moments = {
                name: shard_like(p, torch.zeros_like(own, device=device, memory_format=torch.contiguous_format))
                for name in names
            }
            counter = {"step": torch.zeros((), dtype=torch.float32, device=device)} if self.by_adam else {}
            self.state[p] = {**counter, **moments}
            return
        for name, value in self.state[p].items():
            dtype = value.dtype if name == "step" else p.dtype
            if value.device != p.device or value.dtype != dtype:
                self.state[p][name] = value.to(p.device, dtype).contiguous()

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """What was learnt of `old` is `new`'s."""
        if old in self.state and old.shape == new.shape:
            self.state[new] = self.state.pop(old)

    def move(self, params: list[nn.Parameter], settings: Mapping[str, Any], finite: Tensor) -> None:
        """One step of `params`, all of which have a gradient, where the bool scalar `finite` holds.

        Args:
            params: of one parameter group.
            settings: that group.
            finite: where it does not hold, nothing changes, states included.
        """
        for device in {p.device for p in params}:
            own = [p for p in params if p.device == device]
            if self.by_adam:
                self._move_by_adam(own, settings, finite.to(device))
            else:
                self._move_by_momentum(own, settings, finite.to(device))

    def _move_by_adam(self, params: list[nn.Parameter], settings: Mapping[str, Any], finite: Tensor) -> None:
        decay, rate = settings["weight_decay"], fallback_rate(settings)
        rate = rate.reshape(()) if isinstance(rate, Tensor) else rate
        if settings["decoupled_weight_decay"] and decay:
            torch._foreach_mul_([local(p) for p in params], 1.0 - finite.to(torch.float32) * (rate * decay))
            decay = 0.0
        states = [self.state[p] for p in params]
        # torch's fused kernel walks through memory: what is laid out in another way than its state moves as a copy.
        moved = [_own(p.detach()).contiguous() for p in params]
        adam(
            moved, [_own(p.grad).contiguous() for p in params if p.grad is not None],
            [_own(s["exp_avg"]) for s in states], [_own(s["exp_avg_sq"]) for s in states], [],
            [s["step"] for s in states],
            # The fused kernel leaves everything as it was where found_inf is 1, without asking the host.
            fused=True, found_inf=(~finite).float(), amsgrad=False, beta1=settings["betas"][0],
            beta2=settings["betas"][1], lr=rate, weight_decay=decay, eps=settings["eps"], maximize=False,
        )  # fmt: skip
        for p, new in zip(params, moved, strict=True):
            if not _own(p).is_contiguous():
                _own(p).copy_(new)

    def _move_by_momentum(self, params: list[nn.Parameter], settings: Mapping[str, Any], finite: Tensor) -> None:
        decay = settings["weight_decay"]
        for p in params:
            assert p.grad is not None
            own, M, weight = local(p), local(self.state[p]["M"]), finite.to(_own(p).dtype)
            gradient = local(p.grad)
            if settings["decoupled_weight_decay"]:
                own.mul_(1.0 - weight * settings["lr"] * decay)
            elif decay:
                gradient = gradient.add(own, alpha=decay)
            M.lerp_(torch.where(finite, gradient, M), 1.0 - settings["momentum"])
            own.sub_(torch.where(finite, settings["lr"] * M, 0.0))


def fallback_rate(settings: Mapping[str, Any]) -> Any:
    """Adam's rate in a parameter group: `fallback_lr` as scheduled, that is times `lr` over the largest `lr` so far."""
    if not settings["curvature"]:
        return settings["lr"]
    rate, peak = settings["lr"], settings["peak_lr"]
    if isinstance(peak, Tensor):
        return settings["fallback_lr"] * (rate / peak.clamp_min(torch.finfo(peak.dtype).tiny))
    return settings["fallback_lr"] * (rate / peak if peak else 0.0)


def _own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, in the same memory, and a complex one as pairs of real numbers."""
    own = local(tensor)
    return torch.view_as_real(own) if own.is_complex() else own
