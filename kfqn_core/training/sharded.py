"""The momenta of sharded parameters: each rank keeps its part, and has the whole while layers move (chapter 12).

An average needs nobody else: it is taken entry by entry, of the rows that a rank has of the gradient. A direction needs
whole matrices, so the parts are put together for it, in one message for all layers that move together, and given back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from kfqn_core.parallel.ranks import Ranks
from kfqn_core.parallel.shards import gather, is_shard, local, padded, padded_numel
from kfqn_core.training.groups import Group

# A parameter, what flattens its gradient, its momentum.
Member = tuple[nn.Parameter, Callable[[Tensor], Tensor], Tensor]


class ShardedMomenta:
    """Those of several groups, of one dtype and device.

    Args:
        members: by the index of their parameter group, groups with which of their sides, weights (0) or biases (1).
    """

    def __init__(self, members: Mapping[int, Sequence[tuple[Group, int]]]):
        self._entries = [
            (index, group, side, p)
            for index, of in members.items() for group, side in of for p in group.parameters(side) if p is not None
        ]  # fmt: skip
        sizes = [padded_numel(p) for *_, p in self._entries]
        _, group, _, _ = self._entries[0]
        self._flat = group.M.W.new_zeros(sum(sizes))
        self._parts = list(self._flat.split(sizes))
        for (_, group, _, p), part in zip(self._entries, self._parts, strict=True):
            old = group.shards[p]
            group.shards[p] = part[: old.numel()].view(old.shape).copy_(old)

    def flats(self) -> Iterator[tuple[int, Tensor, list[Member]]]:
        """By parameter group: its index, its part of the flat tensor; every parameter, what flattens it, and its M."""
        by_index: dict[int, list[Member]] = defaultdict(list)
        for (index, _, _, p), part in zip(self._entries, self._parts, strict=True):
            by_index[index].append((p, padded, part))
        sizes = [sum(part.numel() for _, _, part in of) for of in by_index.values()]
        for (index, of), flat in zip(by_index.items(), self._flat.split(sizes), strict=True):
            yield index, flat, of

    def gather(self) -> None:
        """Give the groups whole momenta."""
        whole = gather([p for *_, p in self._entries], self._flat)
        of_side: dict[tuple[Group, int], list[Tensor]] = defaultdict(list)
        for (_, group, side, _), M in zip(self._entries, whole, strict=True):
            of_side[group, side].append(group.as_rows(side, len(of_side[group, side]), M))
        for (group, side), rows in of_side.items():
            group.set_momentum(side, torch.cat(rows))

    def release(self) -> None:
        """Take them away; what stands in their place takes no memory."""
        for _, group, side, _ in self._entries:
            M = group.momentum(side)
            group.set_momentum(side, M.new_zeros(()).expand(M.shape))


def lengths_over_ranks(
    ranks: Ranks, weights: Sequence[nn.Parameter], lengths: dict[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Lengths of gradients as a whole, where those of the sharded ones among `weights` are of the rows of this rank."""
    shards = [p for p in weights if is_shard(p)]
    if not shards:
        return lengths
    own = [lengths[p] if p in lengths else _no_length(p) for p in shards]
    squares = ranks.sums(torch._foreach_mul(own, own))
    return {**lengths, **dict(zip(shards, torch._foreach_sqrt(squares), strict=True))}


def _no_length(p: nn.Parameter) -> Tensor:
    return local(p).new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))
