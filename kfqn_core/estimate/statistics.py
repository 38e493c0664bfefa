"""The statistics of a mini-batch: abar, A v, A, its diagonal, hbar and gbar, of what was seen of a layer.

Arithmetic alone: what was seen is decided in `hooks`. A `Record` holds the uses of one layer; a `Batch` the records of
layers of one shape, and gives the same statistics with the layers side by side along axis 0. Every use is of samples of
its own, whether a layer is used again by the same forward (shared weights), by another one behind the same loss, or by
that of the next micro-batch; the losses of micro-batches are scaled so that their gradients add up to that of the mean.
Derived in chapters 8 and 9.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kfqn_core.layers import LayerView, LinearView

STACKED = 2**22  # entries of inputs that are copied side by side: beyond, a copy costs more than the calls it saves


class Statistics(Protocol):
    """What the factors ask of a mini-batch. `B` counts the groups of a layer, or those of all layers of a `Batch`."""

    def mean_input(self) -> Tensor:
        """abar: mean of `a` over samples and locations, `[B, d_in]`."""

    def activation_action(self, v: Tensor) -> Tensor:
        """`A v` for `v` `[B, d_in]` or `[B, d_in, k]`, without forming `A`."""

    def second_moment(self) -> Tensor:
        """A: mean over samples of the sum over locations of `a a^T`, `[B, d_in, d_in]`."""

    def diagonal(self) -> Tensor:
        """The diagonal of A, `[B, d_in]`, without forming `A`."""

    def vectors(self) -> float | Tensor:
        """How many input vectors `A` is a mean over, samples times locations: a number, or `[B]`."""


@dataclass(eq=False)
class Use:
    """One use of a layer: its input, and what is known of its output.

    Attributes:
        x: the input, samples along axis 0; of a thinned one not all of them, and None if nothing is known of it.
        T: locations per sample.
        samples: N, how many there were. Default: those of `x`.
        each: how many of them one sample of `x` stands for.
        h_sum, g_sum: `[groups, d_out]`, sums over samples and locations: of the pre-activation, and of the gradient of
            the loss.
        serial: uses are numbered as they happen.
        version: of `x`, when it was seen.
    """

    x: Tensor | None
    T: int
    samples: int = -1
    each: float = 1.0
    h_sum: Tensor | None = None
    g_sum: Tensor | None = None
    serial: int = 0
    version: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0:
            self.samples = 0 if self.x is None else self.x.shape[0]

    def check(self) -> None:
        """Forget the input if it was written over since it was seen."""
        if self.x is not None and version_of(self.x) != self.version:
            self.x = None

    @property
    def known(self) -> float:
        """The number of samples that those in `x` stand for."""
        return 0.0 if self.x is None else self.each * self.x.shape[0]


def version_of(x: Tensor) -> int:
    """Counts what was written into a tensor; 0 for one made in inference mode, which nothing counts."""
    return 0 if x.is_inference() else x._version


def thin(uses: Sequence[Use], *, vectors: float = math.inf, entries: float = math.inf) -> None:
    """Keep every k-th sample of all uses taken together, with a k that leaves at most about so many inputs.

    At least one sample stays. What is kept is a copy, so that the rest can be freed. `k` is an odd prime: where samples
    are the positions of sequences one after the other, a k with a divisor of their length would always meet the same.

    Args:
        uses: changed in place.
        vectors: how many input vectors are to be left, at most about.
        entries: how many numbers, as the layer gets them (where patches overlap, fewer than those of the vectors).
    """
    for use in uses:
        use.check()  # a copy would be of something else, and nobody could tell
    known = [use for use in uses if use.x is not None]
    kept_vectors = sum(use.x.shape[0] * use.T for use in known if use.x is not None)
    kept_entries = sum(use.x.numel() for use in known if use.x is not None)
    every = max(math.ceil(kept_vectors / vectors), math.ceil(kept_entries / entries))
    if every <= 1:
        return
    every = _odd_prime(every)
    first = 0  # of this use's samples, the first to be kept: the stride runs on over the uses
    for use in uses:
        if use.x is not None:
            count = use.x.shape[0]
            use.x, use.version = (use.x[first::every].clone() if first < count else None), 0
            use.each *= every
            first = (first - count) % every


def _odd_prime(least: int) -> int:
    """The smallest odd prime that is not below `least`."""
    candidate = max(3, least | 1)
    while any(candidate % divisor == 0 for divisor in range(3, math.isqrt(candidate) + 1, 2)):
        candidate += 2
    return candidate


@dataclass
class Record:
    """All uses of one layer since the last step, on this rank.

    Attributes:
        view: of the layer.
        uses: in the order in which backward reached them.
        scale: of the loss whose gradients were seen (`GradScaler`); a gradient is divided by it.
        size_then, size_now: lengths of the weight's gradient as backward left it, and as the step finds it, if known.
        touched: whether somebody wrote into the gradient in between.

    Raises of every statistic:
        ValueError: if nothing is known of what it is a statistic of.
    """

    view: LayerView
    uses: list[Use] = field(default_factory=list)
    scale: float | Tensor = 1.0
    size_then: Tensor | None = None
    size_now: Tensor | None = None
    touched: bool = False

    @property
    def samples(self) -> int:
        """N over all uses."""
        return sum(use.samples for use in self.uses)

    @property
    def T(self) -> float:
        """Locations per sample on this rank (a mean, where uses differ)."""
        return sum(use.samples * use.T for use in self.uses) / self.samples

    @property
    def has_inputs(self) -> bool:
        """Whether the input of a use is known."""
        return any(use.x is not None for use in self.uses)

    @property
    def has_outputs(self) -> bool:
        """Whether output and gradient of every use are known."""
        return all(use.h_sum is not None and use.g_sum is not None for use in self.uses)

    def uses_alike(self, other: Record) -> bool:
        """Whether both hold as many uses, of as many samples and locations, in the same order."""
        return [(use.samples, use.T) for use in self.uses] == [(use.samples, use.T) for use in other.uses]

    def since(self, serial: int) -> Record:
        """The record of the uses from `serial` on."""
        return replace(self, uses=[use for use in self.uses if use.serial >= serial])

    def mean_input(self) -> Tensor:
        """abar: mean of `a` over samples and locations, `[groups, d_in]`."""
        uses = self._with_inputs()
        if len(uses) == 1:
            return self.view.mean_input(uses[0][0])
        total = sum(use.known * use.T for _, use in uses)
        return _total(use.known * use.T / total * self.view.mean_input(x) for x, use in uses)

    def mean_output(self) -> Tensor:
        """hbar: mean of `h` over samples and locations, `[groups, d_out]`."""
        return _total(_known(use.h_sum) for use in self.uses) / (self.samples * self.T)

    def mean_gradient(self) -> Tensor:
        """gbar: mean over samples and locations of the per-sample gradients `dl_i/dh`, `[groups, d_out]`.

        The loss is a mean over samples, so that summing its gradient over them gives the mean per-sample gradient.
        """
        return _total(_known(use.g_sum) for use in self.uses) / (self.T * self.scale)

    def second_moment(self) -> Tensor:
        """A: mean over samples of the sum over locations of `a a^T`, `[groups, d_in, d_in]`."""
        return self._sum_over_uses(self.view.second_moment)

    def activation_action(self, v: Tensor) -> Tensor:
        """`A v` for `v` `[groups, d_in]` or `[groups, d_in, k]`, without forming `A`."""
        return self._sum_over_uses(lambda x: self.view.activation_action(x, v))

    def diagonal(self) -> Tensor:
        """The diagonal of A, `[groups, d_in]`, without forming `A`."""
        return self._sum_over_uses(self.view.diagonal)

    def vectors(self) -> float:
        """How many input vectors are known."""
        return sum(use.x.shape[0] * use.T for use in self.uses if use.x is not None)

    def _with_inputs(self) -> list[tuple[Tensor, Use]]:
        uses = [(use.x, use) for use in self.uses if use.x is not None]
        if not uses:
            raise ValueError(
                "the inputs of this layer are not known: forward and backward must pass it before the step"
            )
        return uses

    def _sum_over_uses(self, statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """A mean over samples of a sum over locations, from its value on the input of each use."""
        uses = self._with_inputs()
        if len(uses) == 1:
            return statistic(uses[0][0])
        known = sum(use.known for _, use in uses)
        return _total(use.known / known * statistic(x) for x, use in uses)


class Batch:
    """The statistics of several layers of one shape, side by side: `B = layers * groups` along axis 0.

    Args:
        views: of the layers; their `groups`, `d_in` and `d_out` are equal.
        records: of the layers; None for one that was not seen, whose rows are then zero.
        like: a tensor whose dtype (of the factors) and device the statistics get.
        outputs: whether outputs and their gradients are asked for, and not inputs.
    """

    def __init__(
        self, views: Sequence[LayerView], records: Sequence[Record | None], like: Tensor, *, outputs: bool = False
    ):  # fmt: skip
        self._views, self._records, self.like = views, records, like
        self.seen = [
            record is not None and bool(record.uses) and (record.has_outputs if outputs else record.has_inputs)
            for record in records
        ]
        self.groups = views[0].groups

    @cached_property
    def left(self) -> Tensor | None:
        """`[L]`, 0 where the gradient in which the uses are was written over with zeros since, and else 1.

        None where no gradient was touched. One that backward is known to have left at zero tells nothing.
        """
        touched = [record if record is not None and record.touched else None for record in self._records]
        if not any(record is not None and record.size_now is not None for record in touched):
            return None
        one = self.like.new_ones(())
        sizes = [(None, None) if record is None else (record.size_then, record.size_now) for record in touched]
        then, now = (
            torch.stack([one if size is None else size.to(one.dtype) for size in of]) for of in zip(*sizes, strict=True)
        )  # fmt: skip
        return ((now > 0) | (then == 0)).to(one.dtype)

    @cached_property
    def present(self) -> Tensor | None:
        """`[B]`, 1 for what was seen, and is in the gradient, and else 0; None where everything is."""
        if all(self.seen):
            return None if self.left is None else self.left.repeat_interleave(self.groups)
        present = self.like.new_tensor([float(seen) for seen in self.seen])
        return (present if self.left is None else present * self.left).repeat_interleave(self.groups)

    def locations(self) -> list[float]:
        """T of every layer; 1 where it was not seen."""
        return [
            record.T if record is not None and seen else 1.0
            for record, seen in zip(self._records, self.seen, strict=True)
        ]

    def mean_input(self) -> Tensor:
        """abar, `[B, d_in]`."""
        if self._rows is not None:
            return self._with_bias(self._rows.mean(1))  # [L, R, d] -> [L, d_in]
        return self._side_by_side(lambda record, rows: record.mean_input(), self._views[0].d_in)

    def activation_action(self, v: Tensor) -> Tensor:
        """`A v` for `v` `[B, d_in]` or `[B, d_in, k]`."""
        if self._rows is not None:
            return _action_on_rows(self._rows, v, self._views[0].has_bias)
        return self._side_by_side(lambda record, rows: record.activation_action(v[rows]), *v.shape[1:])

    def second_moment(self) -> Tensor:
        """A, `[B, d_in, d_in]`."""
        d_in = self._views[0].d_in
        return self._side_by_side(lambda record, rows: record.second_moment(), d_in, d_in)

    def diagonal(self) -> Tensor:
        """The diagonal of A, `[B, d_in]`."""
        if self._rows is not None:
            return self._with_bias(self._rows.square().mean(1))  # [L, R, d] -> [L, d_in]
        return self._side_by_side(lambda record, rows: record.diagonal(), self._views[0].d_in)

    def vectors(self) -> float | Tensor:
        """How many input vectors every layer has: one number where they are alike, else `[B]`."""
        here = self.vectors_of_layers()
        if len(set(here)) == 1:
            return here[0]
        # Filled, not copied: a copy from the host would wait for the device.
        counts = torch.stack([torch.full((), count, dtype=torch.float32, device=self.like.device) for count in here])
        return counts.repeat_interleave(self.groups)

    def vectors_of_layers(self) -> list[float]:
        """How many input vectors every layer has."""
        return [record.vectors() if record is not None else 0.0 for record in self._records]

    def mean_output(self) -> Tensor:
        """hbar, `[B, d_out]`."""
        return self._side_by_side(lambda record, rows: record.mean_output(), self._views[0].d_out)

    def mean_gradient(self) -> Tensor:
        """gbar, `[B, d_out]`."""
        return self._side_by_side(lambda record, rows: record.mean_gradient(), self._views[0].d_out)

    @cached_property
    def _rows(self) -> Tensor | None:
        """Inputs of fully connected layers side by side, `[L, R, d]`, where they are alike and a copy is cheap."""
        if not all(isinstance(view, LinearView) for view in self._views):
            return None
        uses = [record.uses if record is not None else [] for record in self._records]
        inputs = [of_layer[0].x for of_layer in uses if len(of_layer) == 1 and of_layer[0].x is not None]
        alike = len(inputs) == len(uses) and all(
            x.dim() == 2 and x.shape == inputs[0].shape and x.dtype == inputs[0].dtype for x in inputs
        )
        if not alike:
            return None
        if len(inputs) == 1:
            return inputs[0].unsqueeze(0).to(self.like.dtype)
        return torch.stack(inputs).to(self.like.dtype) if len(inputs) * inputs[0].numel() <= STACKED else None

    def _with_bias(self, means: Tensor) -> Tensor:
        """`[L, d]` and a 1 for the bias if there is one."""
        return pad(means, (0, 1), value=1.0) if self._views[0].has_bias else means

    def _side_by_side(self, statistic: Callable[[Record, slice], Tensor], *shape: int) -> Tensor:
        parts = []
        for i, (record, seen) in enumerate(zip(self._records, self.seen, strict=True)):
            if record is not None and seen:
                parts.append(statistic(record, slice(i * self.groups, (i + 1) * self.groups)).to(self.like.dtype))
            else:
                parts.append(self.like.new_zeros(self.groups, *shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _action_on_rows(rows: Tensor, v: Tensor, has_bias: bool) -> Tensor:
    """`LinearView.activation_action` for layers side by side: rows `[L, R, d]`, `v` `[L, d_in]` or `[L, d_in, k]`."""
    V = v.unsqueeze(-1) if v.dim() == 2 else v  # [L, d_in, k]
    R = rows.shape[1]
    if has_bias:
        scores = torch.baddbmm(V[:, -1:], rows, V[:, :-1], beta=1 / R, alpha=1 / R)  # [L, R, k]
        action = torch.cat([torch.bmm(rows.mT, scores), scores.sum(1, keepdim=True)], dim=1)
    else:
        action = torch.bmm(rows.mT, torch.bmm(rows, V) / R)
    return action.squeeze(-1) if v.dim() == 2 else action


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *others = values
    return sum(others, first)


def _known(value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(
            "this pass holds no output or no gradient of the layer: backward must reach every layer that forward used"
        )
    return value


serials = itertools.count(1)
"""The numbers of uses."""
