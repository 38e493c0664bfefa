"""What a step does to all layers at once: average the gradients, measure the directions, move (chapter 8).

What can be done to the layers of one parameter group together is: their momenta are one flat tensor, of which every
`Group` holds its part as views, and the lengths of all rows of all directions are another. So a step between two
updates of curvature takes a few operations for each shape of layer, and a few for all of them. `groups.plain_step` says
the same for one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.maths.columns import Columns
from kfqn_core.training.groups import Group
from kfqn_core.training.length import Lengths

Settings = Sequence[Mapping[str, Any]]
Indices = tuple[int, int]


class Moves:
    """The average and the move of the layers of several groups.

    Args:
        groups: each with the indices of the parameter groups of its weights and of its biases. Their `M` becomes views
            of flat tensors that are owned here.
    """

    def __init__(self, groups: Sequence[tuple[Group, Indices]]):
        self._groups = groups
        self._lengths: dict[tuple[int, ...], Lengths] = {}
        members: dict[tuple[Any, ...], list[tuple[Group, int]]] = {}
        for group, indices in groups:
            for side, part in enumerate(group.M):
                if part is not None:
                    members.setdefault((indices[side], part.dtype, part.device), []).append((group, side))
        self._flats = [(key[0], _flattened(of), of) for key, of in members.items()]

    def average(self, settings: Settings, finite: Tensor) -> None:
        """`M <- momentum M + (1 - momentum) ([dW | db] + weight_decay [W | b])` where `finite` holds.

        A parameter without gradient keeps its momentum. A decoupled decay is no part of M.

        Args:
            settings: the parameter groups of the optimizer.
            finite: bool scalar.
        """
        for index, flat, members in self._flats:
            of = settings[index]
            G = torch.cat(list(_gradients(members))).to(flat.dtype)
            if of["weight_decay"] and not of["decoupled_weight_decay"]:
                G.add_(torch.cat(list(_values(members))).to(flat.dtype), alpha=of["weight_decay"])
            # Where a step is skipped the weight is zero; but 0 times NaN is NaN, so what is not finite becomes zero.
            G.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            flat.lerp_(G, finite.to(flat.device, flat.dtype) * (1.0 - of["momentum"]))

    def move(self, settings: Settings, finite: Tensor) -> None:
        """`[W | b] <- [W | b] - lr length(D)` with `D = H_g M H_a` where `finite` holds, after a decoupled decay.

        Parameters without gradient stay.
        """
        kinds: dict[Any, list[tuple[Group, Indices]]] = {}
        for group, indices in self._groups:
            if group.has_gradient():
                kinds.setdefault((group.M.W.dtype, group.M.W.device), []).append((group, indices))
        for (dtype, device), members in kinds.items():
            taken = finite.to(device, dtype)
            rates = {i: (taken * settings[i]["lr"]).reshape(()) for i in {i for _, indices in members for i in indices}}
            for i, rate in rates.items():
                self._decay(i, rate, members, settings[i])
            self._move(members, rates)

    def _move(self, members: list[tuple[Group, Indices]], rates: Mapping[int, Tensor]) -> None:
        directions = [group.direction() for group, _ in members]  # D, [B, d_out, d_in] each
        key = tuple(id(group) for group, _ in members)
        if key not in self._lengths:
            self._lengths[key] = Lengths([group.size for group, _ in members], directions[0])
        units = self._lengths[key].divisors(directions, members[0][0].options.step_length)
        # Where the step is skipped the rate is zero, and what D is divided by infinite.
        divisors = {i: self._lengths[key].by_group(units / rate) for i, rate in rates.items()}
        params: list[Tensor] = []
        steps: list[Tensor] = []
        for k, ((group, indices), D) in enumerate(zip(members, directions, strict=True)):
            for side, part in enumerate(Columns.split(D, group.M.b is not None)):
                moving = list(_moving(group, side))
                if part is None or not moving:
                    continue
                step = (part / divisors[indices[side]][k]).split(group.groups)  # dense; of each layer
                params += [p for _, p in moving]
                steps += [group.as_parameter(side, i, step[i]) for i, _ in moving]
        torch._foreach_sub_(params, steps)

    def _decay(self, index: int, rate: Tensor, members: list[tuple[Group, Indices]], of: Mapping[str, Any]) -> None:
        if of["decoupled_weight_decay"] and of["weight_decay"]:
            shrinking: list[Tensor] = [
                p for group, indices in members for side in (0, 1) if indices[side] == index
                for _, p in _moving(group, side)
            ]  # fmt: skip
            if shrinking:  # of a group of biases, for instance, none may have a gradient
                torch._foreach_mul_(shrinking, 1.0 - rate * of["weight_decay"])


def _flattened(members: list[tuple[Group, int]]) -> Tensor:
    """The momenta of one side of several groups as one flat tensor, of which the groups get views in their place."""
    flat = torch.cat([group.momentum(side).reshape(-1) for group, side in members])
    parts = flat.split([group.momentum(side).numel() for group, side in members])
    for (group, side), part in zip(members, parts, strict=True):
        part = part.view_as(group.momentum(side))
        group.M = group.M._replace(b=part) if side else group.M._replace(W=part)
    return flat


def _gradients(members: list[tuple[Group, int]]) -> Iterator[Tensor]:
    """The gradients in the order of a flat tensor; where there is none the momentum, which then stays."""
    for group, side in members:
        for i, p in enumerate(group.parameters(side)):
            if p is not None and p.grad is not None:
                yield group.as_rows(side, i, p.grad).reshape(-1)
            else:
                yield group.momentum(side)[group.rows(i)].reshape(-1)


def _values(members: list[tuple[Group, int]]) -> Iterator[Tensor]:
    """The parameters in the order of a flat tensor; zero where there is no gradient."""
    for group, side in members:
        for i, p in enumerate(group.parameters(side)):
            if p is not None and p.grad is not None:
                yield group.as_rows(side, i, p).reshape(-1)
            else:
                yield torch.zeros_like(group.momentum(side)[group.rows(i)]).reshape(-1)


def _moving(group: Group, side: int) -> Iterator[tuple[int, nn.Parameter]]:
    """The parameters of one side that have a gradient, with the number of their layer."""
    for i, p in enumerate(group.parameters(side)):
        if p is not None and p.grad is not None:
            yield i, p
