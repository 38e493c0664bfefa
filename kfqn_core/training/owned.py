"""Factors that one rank keeps for all, at work in a step: `parallel.owners` says who, and what a message holds.

An owner's part of a step is what one process does; the others have the shapes of its factors, on "meta". So every rank
knows what will be sent, and by whom, without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kfqn_core.parallel.owners import fetch, shares
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.parallel.shards import processes, spread_over
from kfqn_core.training.factors import Factors, Sizes
from kfqn_core.training.groups import Group
from kfqn_core.training.options import Options
from kfqn_core.training.selection import Selected


def ranks_of(model: nn.Module, given: Any, options: Options) -> Ranks:
    """The processes that train `model`: what is known of them when the optimizer is made.

    Raises:
        TypeError, ValueError: see `parallel.shards.processes`.
        ValueError: if factors are to have owners, and parameters are sharded, or it is not known who the owners are.
    """
    ranks = Ranks(processes(model, given))
    if not options.owners:
        return ranks
    if spread_over(model) is not None:
        raise ValueError(
            "owners=True shares out the factors of whole parameters, and these are sharded by fully_shard: leave it "
            "out, or use DistributedDataParallel"
        )
    ranks.look(model)
    try:
        ranks.require_group()
    except RuntimeError as error:
        raise ValueError(
            "owners=True shares out factors when KFQN is made, and nothing tells between which processes: wrap the "
            "model in DistributedDataParallel first and give KFQN the wrapper, or say KFQN(model, process_group=...)"
        ) from error
    return ranks


def owners_of(
    layers: Mapping[str, Selected],
    kinds: Mapping[str, str],
    options: Options,
    ranks: Ranks,
    given: Mapping[str, int | None],
) -> Mapping[str, int | None]:
    """By name, the rank that keeps the factors of a layer; None where all do.

    Args:
        layers: that have factors.
        kinds: the forms of their activation factors.
        options: of the method.
        ranks: that train the model.
        given: the owners of those that had one in the last plan, who keep them.
    """
    if not options.owners or ranks.alone:
        return dict.fromkeys(layers)
    costs = {}
    for name, layer in layers.items():
        view = layer.view
        sizes = Sizes(view.groups, view.d_in, view.d_out)
        on_paper = {"dtype": torch.float32, "device": torch.device("meta")}
        costs[name] = _numbers(Factors(kinds[name], sizes, options.of(view), on_paper).tensors().values())
    return shares(costs, ranks.size, {name: owner for name, owner in given.items() if owner is not None})


def refuse_copies(groups: Iterable[Group]) -> None:
    """Raise RuntimeError if this process has not all factors."""
    if any(group.owner is not None for group in groups):
        raise RuntimeError(
            "with owners=True this process has a share of the factors, so that a copy or a pickle of KFQN would lack "
            "the others: call state_dict() on every rank, which brings them together"
        )


def sent(group: Group) -> dict[str, Tensor]:
    """What the owner of a group sends in every step, by name: `D`, or the tensors it is made from if they are less."""
    L, in_each, d_out, d_in = group.size
    D, read = group.M.W.new_empty(L * in_each, d_out, d_in, device="meta"), group.factors.read()
    return {"D": D} if D.numel() <= _numbers(read.values()) else read


def directions(groups: Sequence[Group], out: Sequence[Tensor]) -> set[Group]:
    """`D` of the groups that have an owner, written to `out`; they are returned."""
    owned = [(group, D, sent(group)) for group, D in zip(groups, out, strict=True) if group.owner is not None]
    entries: list[tuple[Group, Tensor]] = []
    for group, D, parts in owned:
        if "D" in parts:
            entries.append((group, group.direction(D) if group.held else D))
        else:
            entries += [(group, tensor) for tensor in parts.values()]
    fetched = iter(_fetched(entries))
    for group, D, parts in owned:
        arrived = {name: next(fetched) for name in parts}
        if "D" not in parts:
            own = group.factors
            group.factors = own.with_tensors(arrived)
            group.direction(D)
            group.factors = own
        elif not group.held:
            D.copy_(arrived["D"])
    return {group for group, *_ in owned}


def along(probes: Mapping[Group, Tensor]) -> dict[Group, Tensor]:
    """What owners ask for the action of `A`, known to all ranks."""
    entries = [(group, v) for group, v in probes.items() if group.owner is not None]
    return {**probes, **dict(zip((group for group, _ in entries), _fetched(entries), strict=True))}


@contextmanager
def whole(groups: Iterable[Group]) -> Iterator[None]:
    """Inside, every rank has all factors; every rank has to enter. What changes of those of others is lost."""
    owned = [group for group in groups if group.owner is not None]
    entries = [(group, tensor) for group in owned for tensor in group.tensors().values()]
    fetched = iter(_fetched(entries))
    kept = [(group, group.factors) for group in owned if not group.held]
    for group in owned:
        tensors = {name: next(fetched) for name in group.tensors()}
        if not group.held:
            group.factors = group.factors.with_tensors(tensors)
    try:
        yield
    finally:
        for group, factors in kept:
            factors.activation.damping = group.activation.damping
            group.factors = factors


def _fetched(entries: Sequence[tuple[Group, Tensor]]) -> list[Tensor]:
    """Every tensor from the owner of its group, in one message for each dtype and device."""
    fetched: list[Tensor] = [tensor for _, tensor in entries]
    alike: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, (group, _) in enumerate(entries):
        alike.setdefault((group.M.W.dtype, group.M.W.device), []).append(i)
    for places in alike.values():
        of = [entries[i] for i in places]
        owners = [group.owner for group, _ in of if group.owner is not None]
        values = fetch(of[0][0].ranks, owners, [tensor for _, tensor in of], of[0][0].M.W)
        for i, value in zip(places, values, strict=True):
            fetched[i] = value
    return fetched


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
