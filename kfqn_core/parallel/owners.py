"""Who keeps the factors of which layer, where every process keeps a share of them, and how others get what they need.

A layer has one *owner*, who alone keeps its factors and updates them. The others need its direction `D` in every step,
and get either that or the tensors it is made from, whichever are fewer numbers; nobody keeps what was fetched, so that
each process holds about one part in P of all factors. Derived and counted in chapter 12.

What is fetched at one time is one message (`fetch`): each of P processes sends as many numbers as the one with the most
to send, and gets

    P max_q sum_{values of owner q} numel(value).

In every step the values are, for each layer, `D` or what it is made from (layers that are too many to move at once move
in turns, with a message for each turn); in a step that updates curvature there is one message more, with the vectors
along which the action of `A` is asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kfqn_core.parallel.ranks import Ranks, all_answering
from kfqn_core.parallel.shards import all_gather

Name = TypeVar("Name", bound=Hashable)


def shares(costs: Mapping[Name, int], ranks: int, given: Mapping[Name, int] | None = None) -> dict[Name, int]:
    """An owner for everything that costs something, so that owners have about equal costs; the same on every rank.

    The costliest first, each to whoever has least so far: where none is given, the largest share is at most
    `4/3 - 1/(3 P)` of the least possible (Graham 1969).

    Args:
        costs: by name.
        ranks: how many owners there may be.
        given: those that have one, who keeps them.
    """
    owners = {name: owner for name, owner in (given or {}).items() if name in costs}
    loads = [0] * ranks
    for name, owner in owners.items():
        loads[owner] += costs[name]
    for name in sorted((name for name in costs if name not in owners), key=lambda name: -costs[name]):  # stable
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def fetch(ranks: Ranks, owners: Sequence[int], values: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Every value from its owner, the same bits on every rank, in one message.

    Args:
        ranks: all of them call this with as many values of the same shapes and owners.
        owners: of the values.
        values: where this rank is not the owner the shape alone counts.
        like: whose dtype and device they have.
    """
    sizes = [value.numel() for value in values]
    totals = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == q) for q in range(ranks.size)]
    own = [value.reshape(-1) for value, owner in zip(values, owners, strict=True) if owner == ranks.rank]
    filling = like.new_zeros(max(totals) - totals[ranks.rank])
    message = like.new_empty(ranks.size * max(totals))  # of rank 0, then of rank 1, ..., filled up to the longest
    with all_answering():
        all_gather()(message, torch.cat([*own, filling]), group=ranks.group)
    places = [q * max(totals) for q in range(ranks.size)]
    fetched = []
    for value, size, owner in zip(values, sizes, owners, strict=True):
        fetched.append(message[places[owner] : places[owner] + size].view(value.shape))
        places[owner] += size
    return fetched
