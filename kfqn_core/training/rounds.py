"""What a step asks of a mini-batch, in two rounds: ranks speak twice, and not once for every layer (chapter 12).

The first round, before the move, asks what depends on nothing: whether the step is to be taken, how many ranks have
seen a layer, means, diagonals, a first `A`. The second, after it, asks what depends on those answers, the action of `A`
along `H_a abar`, and on the move, the means of a second evaluation. A step that learns nothing sends one flag. One
process asks the same and sends nothing. Where factors have owners, these tell before the second round along what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kfqn_core.estimate.activation import Activation, ActivationFactor, ExactActivationFactor, update_together
from kfqn_core.estimate.shared import AnyBatch, SharedBatch, share
from kfqn_core.estimate.statistics import Record
from kfqn_core.parallel.ranks import Ranks
from kfqn_core.training.groups import Group
from kfqn_core.training.owned import along

Batches = Mapping[Group, AnyBatch]


def seen(
    groups: Iterable[Group],
    records: Mapping[str, Record],
    elsewhere: Collection[str],
    *,
    average: bool,
    due: Collection[str],
) -> dict[Group, AnyBatch]:
    """The statistics of the groups that learn of `H_a` in this step; the first round is wanted.

    Args:
        groups: all.
        records: of this rank.
        elsewhere: names of the layers without a first estimate that some rank has seen.
        average: whether a running `A` takes the mini-batch in.
        due: names of the layers whose curvature is updated.
    """
    batches: dict[Group, AnyBatch] = {}
    for group in groups:
        batch = group.batch(records)
        if isinstance(batch, SharedBatch):
            start = group.starts(batch, elsewhere)
            names = first_asked(group.activation, start=start, average=average, update=learns(group, due))
            if not names:
                continue
            batch.want(*names, *(["locations"] if group.options.split else []))
        if batch is not None:
            batches[group] = batch
    return batches


def first_asked(factor: Activation, *, start: bool, average: bool, update: bool) -> list[str]:
    """The names of the statistics that depend on nothing and that `start`, `average` and `update` will ask for."""
    if not isinstance(factor, ActivationFactor):
        return ["diagonal"] if start or update else []
    inverts = type(factor) is ExactActivationFactor
    names = []
    if start or (average and factor.A is not None) or (update and inverts and factor.A is None):
        names.append("second_moment")
    if start and factor.shrunk:
        names.append("vectors")
    if update and not inverts:
        names.append("mean_input")
    return names or (["present"] if update else [])


def first_round(ranks: Ranks, batches: Iterable[AnyBatch], finite: Tensor) -> Tensor:
    """Fetch what is wanted. Returns whether the bool scalar `finite` holds on every rank."""
    return share(ranks, _shared(batches), finite)


def second_round(
    ranks: Ranks, batches: Batches, due: Collection[str], pairs: Iterable[AnyBatch]
) -> dict[Group, Tensor]:  # fmt: skip
    """Fetch what updates of `H_a`, and `pairs`, ask for.

    Args:
        ranks: that have a part of the mini-batch each.
        batches: by group.
        due: names of the layers whose `H_a` is updated.
        pairs: statistics that want something.

    Returns:
        The vectors along which the action of `A` was fetched.
    """
    shared = {
        group: batch for group, batch in batches.items() if isinstance(batch, SharedBatch) and learns(group, due)
    }  # fmt: skip
    wanted = {group: group.activation.probe(batch) for group, batch in shared.items()}
    probes = along({group: v for group, v in wanted.items() if v is not None})
    for group, v in probes.items():
        shared[group].want(along=v)
    share(ranks, [*shared.values(), *_shared(pairs)])
    return probes


def update(
    batches: Batches, finite: Tensor, due: Collection[str], probes: Mapping[Group, Tensor] | None = None
) -> None:  # fmt: skip
    """One update of every `H_a` kept here that is due, where `finite` holds, the layer was seen and has been started.

    Args:
        batches: by group.
        finite: bool scalar.
        due: names of layers.
        probes: what `second_round` returned.
    """
    probes = probes or {}
    alike: dict[Any, list[Group]] = {}
    for group in (group for group in batches if group.held and learns(group, due)):
        alike.setdefault((group.M.W.dtype, group.M.W.device), []).append(group)
    for groups in alike.values():
        update_together(
            [group.activation for group in groups],
            [batches[group] for group in groups],
            [group.updating(batches[group], where_due(group, due, finite)) for group in groups],
            [probes.get(group) for group in groups],
        )


def learns(group: Group, due: Collection[str]) -> bool:
    """Whether the curvature of one of its layers is `due`."""
    return any(layer.name in due for layer in group.layers)


def where_due(group: Group, due: Collection[str], finite: Tensor) -> Tensor:
    """Where the bool scalar `finite` holds and a layer is `due`: a scalar if all of them are, else `[B]`."""
    own = [layer.name in due for layer in group.layers]
    if all(own):
        return finite
    return finite & torch.tensor(own, device=finite.device).repeat_interleave(group.groups)


def _shared(batches: Iterable[AnyBatch]) -> list[SharedBatch]:
    return [batch for batch in batches if isinstance(batch, SharedBatch)]
