"""What a step does to all layers at once: average the gradients, measure the directions, move (chapter 8).

What can be done to the layers of one parameter group together is: their momenta are one flat tensor, of which every
`Group` holds its part as views, and the lengths of all rows of all directions are another. So a step between two
updates of curvature takes a few operations for each shape of layer, and a few for all of them. `groups.plain_step` says
the same for one layer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.layers import LayerView
from kfqn_core.maths.columns import Columns
from kfqn_core.parallel.shards import local, own_rows
from kfqn_core.training import steadiness
from kfqn_core.training.groups import Group
from kfqn_core.training.length import Lengths
from kfqn_core.training.owned import directions
from kfqn_core.training.sharded import ShardedMomenta
from kfqn_core.training.steadiness import Steadiness

Settings = Sequence[Mapping[str, Any]]
Indices = tuple[int, int]

# Of a unit that stopped being used M decays for ever, into numbers with which a CPU computes a hundred times slower. So
# far below any length that counts (`length.SHORTEST`), and above those by more than it decays between two updates.
NOTHING = 1e-30


class Moves:
    """The average and the move of the layers of several groups.

    Args:
        groups: each with the indices of the parameter groups of its weights and of its biases. Their `M` becomes views
            of flat tensors that are owned here.
        depth: how many layers the whole plan has.
        bench: shared with the other moves of a plan, which come one after the other; None where the groups are not
            small, and what a step writes is better given back at once.
    """

    def __init__(self, groups: Sequence[tuple[Group, Indices]], depth: int = 1, bench: Bench | None = None):
        self._groups, self._bench = groups, bench
        self._depth = depth
        self._lengths: dict[tuple[int, ...], Lengths] = {}
        self._workspaces: dict[tuple[int, ...], _Workspace] = {}
        members: dict[tuple[Any, ...], list[tuple[Group, int]]] = {}
        sharded: dict[tuple[Any, ...], dict[int, list[tuple[Group, int]]]] = {}
        for group, indices in groups:
            for side, part in enumerate(group.M):
                if part is not None and group.shards:
                    of = sharded.setdefault((part.dtype, part.device), {})
                    of.setdefault(indices[side], []).append((group, side))
                elif part is not None:
                    members.setdefault((indices[side], part.dtype, part.device), []).append((group, side))
        self._flats = [(key[0], _flattened(of), _in_order(of)) for key, of in members.items()]
        self._sharded = [ShardedMomenta(of) for of in sharded.values()]
        self._flats += [flat for momenta in self._sharded for flat in momenta.flats()]
        alike: dict[Any, list[Group]] = {}
        for group, _ in groups:
            if group.steady is not None:
                alike.setdefault((group.M.W.dtype, group.M.W.device), []).append(group)
        self._steady = {key: (_steadiness(of), of) for key, of in alike.items()}
        for members_of_kind in self._kinds(groups).values():
            self._lengths_of(members_of_kind)  # made now: in a step, the host would wait for its copies

    def average(
        self, settings: Settings, finite: Tensor, lengths: Mapping[nn.Parameter, Tensor], *, drop: bool = False
    ) -> None:
        """`M <- momentum M + (1 - momentum) ([dW | db] + weight_decay [W | b])` where `finite` holds.

        A parameter without gradient keeps its momentum. A decoupled decay is no part of M.

        Args:
            settings: the parameter groups of the optimizer.
            finite: bool scalar.
            lengths: of the gradients, by parameter.
            drop: whether entries of M below `NOTHING` become zero.
        """
        of_weights = self._of_weights()
        for (_, device), (steady, groups) in self._steady.items():
            momentum = [settings[of_weights[id(group)]]["momentum"] for group in groups for _ in group.layers]
            steady.observe(lengths, momentum, finite.to(device))
        for index, flat, members in self._flats:
            of = settings[index]
            # Where there is no gradient stands the momentum, which then stays.
            G = torch.cat([M if p.grad is None else flatten(p.grad) for p, flatten, M in members]).to(flat.dtype)
            if of["weight_decay"] and not of["decoupled_weight_decay"]:
                W = torch.cat([torch.zeros_like(M) if p.grad is None else flatten(p) for p, flatten, M in members])
                G.add_(W.to(flat.dtype), alpha=of["weight_decay"])
            torch.where(finite.to(flat.device), G, flat, out=G)  # where a step is skipped G need not be a number
            flat.lerp_(G, 1.0 - of["momentum"])
            if drop:
                torch.hardshrink(flat, NOTHING, out=flat)

    def move(self, settings: Settings, finite: Tensor) -> None:
        """`[W | b] <- [W | b] - lr length(D)` with `D = H_g M H_a` where `finite` holds, after a decoupled decay.

        Parameters without gradient stay.
        """
        moving = [(group, indices) for group, indices in self._groups if group.has_gradient()]
        for momenta in self._sharded if moving else ():
            momenta.gather()
            for steady, groups in self._steady.values():
                steady.M = _of_weights(groups)
        for (dtype, device), members in self._kinds(moving).items():
            taken = finite.to(device, dtype)
            rates = {i: (taken * settings[i]["lr"]).reshape(()) for i in {i for _, indices in members for i in indices}}
            for i, rate in rates.items():
                self._decay(i, rate, members, settings[i])
            self._move(members, rates, settings)
        for momenta in self._sharded if moving else ():
            momenta.release()
            for steady, groups in self._steady.values():
                steady.M = _of_weights(groups)

    @staticmethod
    def _kinds(
        groups: Sequence[tuple[Group, Indices]],
    ) -> dict[tuple[torch.dtype, torch.device], list[tuple[Group, Indices]]]:
        """By dtype and device, since one operation takes tensors of one kind."""
        kinds: dict[tuple[torch.dtype, torch.device], list[tuple[Group, Indices]]] = {}
        for group, indices in groups:
            kinds.setdefault((group.M.W.dtype, group.M.W.device), []).append((group, indices))
        return kinds

    def _move(self, members: list[tuple[Group, Indices]], rates: Mapping[int, Tensor], settings: Settings) -> None:
        space = self._workspace(members)
        fetched = directions([group for group, _ in members], space.directions)
        for (group, _), D, norms in zip(members, space.directions, space.norms_of, strict=True):
            torch.linalg.vector_norm(D if group in fetched else group.direction(D), dim=-1, out=norms)
        units = space.lengths.divisors(space.norms, members[0][0].options.step_length)
        shares = self._shares([group for group, _ in members], settings)
        space.make_steps()
        for i, rate in rates.items():
            if shares is not None:
                rate = space.lengths.rows_of(rate * shares)
            # Where the step is skipped the rate is zero, and what D is divided by infinite.
            torch.div(units, rate, out=space.divisors[i])
        for k, (_, indices) in enumerate(members):
            for side, (part, step) in enumerate(zip(space.parts[k], space.steps[k], strict=True)):
                if part is not None:
                    torch.div(part, space.divisors_of[indices[side]][k], out=step)
        moving = [(local(p), step()) for p, step in space.as_parameters if p.grad is not None]
        torch._foreach_sub_([p for p, _ in moving], [step for _, step in moving])

    def _shares(self, groups: Sequence[Group], settings: Settings) -> Tensor | None:
        """Of a full step, of the layers of these groups, `[layers]`; None if steps do not depend on it."""
        place = self._steady.get((groups[0].M.W.dtype, groups[0].M.W.device))
        if place is None:
            return None
        steady, of_groups = place
        of_weights = self._of_weights()
        standing = {i: steadiness.stands(settings[i]["lr"], settings[i]["peak_lr"]) for i in of_weights.values()}
        shares = steady.shares([standing[of_weights[id(group)]] for group in of_groups for _ in group.layers])
        if len(groups) == len(of_groups):
            return shares
        parts = dict(zip(map(id, of_groups), shares.split([len(group.layers) for group in of_groups]), strict=True))
        return torch.cat([parts[id(group)] for group in groups])

    def _of_weights(self) -> dict[int, int]:
        """The parameter group of the weights of every group, by its id."""
        return {id(group): index for group, (index, _) in self._groups}

    def _lengths_of(self, members: Sequence[tuple[Group, Indices]]) -> Lengths:
        key = tuple(id(group) for group, _ in members)
        if key not in self._lengths:
            sizes = [group.size for group, _ in members]
            self._lengths[key] = Lengths(sizes, members[0][0].M.W, self._depth)
        return self._lengths[key]

    def _workspace(self, members: list[tuple[Group, Indices]]) -> _Workspace:
        key, lengths = tuple(id(group) for group, _ in members), self._lengths_of(members)
        if self._bench is None:
            return _Workspace(members, Bench(), lengths)
        if key not in self._workspaces:
            self._workspaces[key] = _Workspace(members, self._bench, lengths)
        return self._workspaces[key]

    def _decay(self, index: int, rate: Tensor, members: list[tuple[Group, Indices]], of: Mapping[str, Any]) -> None:
        if of["decoupled_weight_decay"] and of["weight_decay"]:
            shrinking: list[Tensor] = [
                local(p) for group, indices in members for side in (0, 1) if indices[side] == index
                for _, p in _moving(group, side)
            ]  # fmt: skip
            if shrinking:  # of a group of biases, for instance, none may have a gradient
                torch._foreach_mul_(shrinking, 1.0 - rate * of["weight_decay"])


class Bench:
    """Memory for what a step writes and nobody needs afterwards: one tensor for each purpose, dtype and device."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, what: str, sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Flat tensors of these sizes, side by side. What was taken under that name before lies in the same place."""
        key = what, like.dtype, like.device
        if key not in self._tensors or self._tensors[key].numel() < sum(sizes):
            self._tensors[key] = like.new_empty(sum(sizes))
        return list(self._tensors[key][: sum(sizes)].split(list(sizes)))


class _Workspace:
    """Where the directions of several groups, the lengths of their rows, and the steps of their parameters are written.

    Attributes:
        lengths: of these groups.
        directions: `D`, `[B, d_out, d_in]` each; `parts` are views of them.
        norms: `[rows]`, of which `norms_of` are views, `[B, d_out]` each.
        divisors: what rows are divided by at the rate of a parameter group, `[rows]`, by its index; `divisors_of` are
            views, `[B, d_out, 1]` each.
        steps: what is subtracted from the weights and from the biases, dense.
        as_parameters: every parameter, with what gives its step, shaped like it.
    """

    def __init__(self, members: Sequence[tuple[Group, Indices]], bench: Bench, lengths: Lengths):
        groups = [group for group, _ in members]
        like, self.lengths = groups[0].M.W, lengths
        shapes = [(L * in_each, d_out, d_in) for L, in_each, d_out, d_in in (group.size for group in groups)]
        sizes = [math.prod(shape) for shape in shapes]
        self._groups, self._bench, self._sizes = groups, bench, sizes
        used = sorted({i for _, indices in members for i in indices})
        *flats, rows = bench.take("directions", [*sizes, lengths.rows * (1 + len(used))], like)
        self.norms, *divisors = rows.split(lengths.rows)
        self.divisors = dict(zip(used, divisors, strict=True))
        self.divisors_of = {i: lengths.by_group(of_rows) for i, of_rows in self.divisors.items()}
        self.directions = [flat.view(shape) for flat, shape in zip(flats, shapes, strict=True)]
        self.norms_of = [norms.squeeze(-1) for norms in lengths.by_group(self.norms)]
        self.parts = [Columns.split(D, g.M.b is not None) for D, g in zip(self.directions, groups, strict=True)]
        self.steps: list[Columns] = []
        self.as_parameters: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []

    def make_steps(self) -> None:
        """Place for the steps, if there is none: after the directions, whose products need memory of the same size."""
        if self.steps:
            return
        flats = self._bench.take("steps", self._sizes, self._groups[0].M.W)
        for group, flat in zip(self._groups, flats, strict=True):
            W, *b = flat.split([part.numel() for part in group.M if part is not None])
            self.steps.append(Columns(W.view_as(group.M.W), b[0].view_as(group.M.b) if group.M.b is not None else None))
            for side, step in enumerate(self.steps[-1]):
                for i, p in enumerate(group.parameters(side)):
                    if p is not None and step is not None:
                        self.as_parameters.append((p, _shaped(group, side, i, step[group.rows(i)])))


def _shaped(group: Group, side: int, i: int, rows: Tensor) -> Callable[[], Tensor]:
    """Gives `rows`, which will be written, shaped like a parameter: a view that stays, or else a copy each time."""
    shaped, p = group.as_parameter(side, i, rows), group.parameters(side)[i]
    if p in group.shards:
        return lambda: own_rows(p, group.as_parameter(side, i, rows))
    if shaped.untyped_storage()._cdata == rows.untyped_storage()._cdata:
        return lambda: shaped
    return lambda: group.as_parameter(side, i, rows)


def _flattened(members: list[tuple[Group, int]]) -> Tensor:
    """The momenta of one side of several groups as one flat tensor, of which the groups get views in their place."""
    flat = torch.cat([group.momentum(side).reshape(-1) for group, side in members])
    parts = flat.split([group.momentum(side).numel() for group, side in members])
    for (group, side), part in zip(members, parts, strict=True):
        group.set_momentum(side, part.view_as(group.momentum(side)))
    return flat


def _steadiness(groups: Sequence[Group]) -> Steadiness:
    """That of several groups, of which they get views in their place."""
    state = torch.cat([group.steady for group in groups if group.steady is not None])
    for group, part in zip(groups, state.split([len(group.layers) for group in groups]), strict=True):
        group.steady = part
    weights = [layer.weight for group in groups for layer in group.layers]
    return Steadiness(state, weights, _of_weights(groups))


def _of_weights(groups: Sequence[Group]) -> list[Tensor]:
    """The momenta of the weights of every layer."""
    return [group.momentum(0)[group.rows(i)] for group in groups for i in range(len(group.layers))]


def _in_order(members: list[tuple[Group, int]]) -> list[tuple[nn.Parameter, Callable[[Tensor], Tensor], Tensor]]:
    """In the order of a flat tensor: every parameter, what flattens a tensor shaped like it, and its momentum there."""
    return [
        (p, _flattener(group, side, i), group.momentum(side)[group.rows(i)].view(-1))
        for group, side in members
        for i, p in enumerate(group.parameters(side))
        if p is not None
    ]


def _flattener(group: Group, side: int, i: int) -> Callable[[Tensor], Tensor]:
    """From a tensor shaped like a parameter to its entries in the order of the rows of `[W | b]`."""
    if side or type(group.layers[i].view).rows_of is LayerView.rows_of:  # which changes no order
        return operator.methodcaller("reshape", -1)
    return lambda tensor: group.as_rows(0, i, tensor).reshape(-1)


def _moving(group: Group, side: int) -> Iterator[tuple[int, nn.Parameter]]:
    """The parameters of one side that have a gradient, with the number of their layer."""
    for i, p in enumerate(group.parameters(side)):
        if p is not None and p.grad is not None:
            yield i, p
