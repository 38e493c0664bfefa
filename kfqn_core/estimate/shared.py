"""The statistics of a mini-batch that several processes hold in parts, and how they travel: together (chapter 12).

What several layers are asked for at one time is wanted first (`SharedBatch.want`) and then fetched in one sum over
ranks (`share`). What has not been wanted is fetched when it is asked for, by itself: right, and slow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import overload

import torch
from torch import Tensor

from kfqn_core.estimate.statistics import Batch
from kfqn_core.parallel.ranks import Ranks


class SharedBatch:
    """The statistics of a `Batch`, each a mean over the ranks that have seen the layer.

    Ranks count alike, as they do in the averaged gradient. Every rank must want the same in the same order.

    Args:
        here: of this rank.
        ranks: that have a part each.

    Attributes:
        groups: of every layer.
        seen: by layer, whether this rank has seen it.
    """

    def __init__(self, here: Batch, ranks: Ranks):
        self._here, self._ranks = here, ranks
        self.groups, self.seen = here.groups, here.seen
        self._wanted: list[str] = []
        self._along: Tensor | None = None  # the vectors of the action of A that is wanted, or known
        self._known: dict[str, Tensor] = {}  # by name, over all ranks

    def want(self, *names: str, along: Tensor | None = None) -> None:
        """What the next `share` is to fetch.

        Args:
            names: of statistics.
            along: the `v` of an `activation_action`, which is then wanted, too.
        """
        if along is not None:
            self._along = along
            self._known.pop("activation_action", None)
            names = (*names, "activation_action")
        for name in ("present", *names) if names else ():  # how many ranks have seen it travels once
            if name not in self._known and name not in self._wanted:
                self._wanted.append(name)

    def outgoing(self) -> list[Tensor]:
        """What is wanted, as this rank has it, to be summed over ranks: zero for a layer that it has not seen.

        Nor has it where what it has seen is no longer in the gradient.
        """
        own, left = [self._own(name) for name in self._wanted], self._here.left
        if left is None:
            return own
        by_group = left.repeat_interleave(self.groups)
        return [
            value * (left if len(value) == len(left) else by_group).view(-1, *[1] * (value.dim() - 1)) for value in own
        ]

    def take_in(self, sums: Iterator[Tensor]) -> None:
        """What was wanted, summed over ranks, in the order of `outgoing`."""
        wanted, self._wanted = self._wanted, []
        for name in wanted:
            total = next(sums)
            if name not in ("present", "vectors"):
                counts = self._known["present"].clamp_min(1)  # [L]
                counts = counts if name == "locations" else counts.repeat_interleave(self.groups)  # [B]
                total = total / counts.view(-1, *[1] * (total.dim() - 1))
            self._known[name] = total

    @property
    def present(self) -> Tensor:
        """`[B]`, 1 for what a rank has seen and else 0."""
        seen = self._over_ranks("present") > 0
        return seen.to(self._here.like.dtype).repeat_interleave(self.groups)

    def locations(self) -> list[float]:
        """T of every layer; 1 where no rank has seen it."""
        return [T or 1.0 for T in self._over_ranks("locations").tolist()]  # waits for the device

    def mean_input(self) -> Tensor:
        """abar, `[B, d_in]`."""
        return self._over_ranks("mean_input")

    def activation_action(self, v: Tensor) -> Tensor:
        """`A v` for `v` `[B, d_in]` or `[B, d_in, k]`."""
        if v is not self._along:
            self.want(along=v)
        return self._over_ranks("activation_action")

    def second_moment(self) -> Tensor:
        """A, `[B, d_in, d_in]`."""
        return self._over_ranks("second_moment")

    def diagonal(self) -> Tensor:
        """The diagonal of A, `[B, d_in]`."""
        return self._over_ranks("diagonal")

    def vectors(self) -> Tensor:
        """How many input vectors every layer has, on all ranks together, `[B]`."""
        return self._over_ranks("vectors").repeat_interleave(self.groups)

    def mean_output(self) -> Tensor:
        """hbar, `[B, d_out]`."""
        return self._over_ranks("mean_output")

    def mean_gradient(self) -> Tensor:
        """gbar, `[B, d_out]`."""
        return self._over_ranks("mean_gradient")

    def _own(self, name: str) -> Tensor:
        here = self._here
        if name == "activation_action":
            assert self._along is not None
            return here.activation_action(self._along)
        if name == "present":
            return here.like.new_tensor([float(seen) for seen in self.seen])  # [L]
        if name == "vectors":
            return here.like.new_tensor(here.vectors_of_layers())  # [L]
        if name == "locations":
            pairs = zip(here.locations(), self.seen, strict=True)
            return here.like.new_tensor([T if seen else 0.0 for T, seen in pairs])  # [L]
        own: Tensor = getattr(here, name)()
        return own

    def _over_ranks(self, name: str) -> Tensor:
        if name not in self._known:
            self.want(name)
            share(self._ranks, [self])
        return self._known[name]


AnyBatch = Batch | SharedBatch  # of one process, or of a rank


@overload
def share(ranks: Ranks, batches: Iterable[SharedBatch], flag: Tensor) -> Tensor: ...


@overload
def share(ranks: Ranks, batches: Iterable[SharedBatch]) -> None: ...


def share(ranks: Ranks, batches: Iterable[SharedBatch], flag: Tensor | None = None) -> Tensor | None:
    """Fetch what is wanted of all these batches in one sum over ranks (one for each dtype and device, if they differ).

    Args:
        ranks: all of them call this with the same wants.
        batches: that want something, or nothing.
        flag: a boolean scalar.

    Returns:
        Whether `flag` holds on every rank; None without one.
    """
    if ranks.alone:
        return flag
    batches = list(batches)
    parts = [batch.outgoing() for batch in batches]
    values = [value for part in parts for value in part]
    if flag is not None:
        dtype = values[0].dtype if values else torch.float32  # any dtype holds the number of ranks
        values.insert(0, flag.to(dtype))
    if not values:
        return None
    sums = iter(ranks.sums(values))
    agreed = None if flag is None else next(sums) == ranks.size
    for batch in batches:
        batch.take_in(sums)
    return agreed
