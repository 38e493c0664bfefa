"""`H_a ~ (A + lambda_A I)^-1`: the interface of an activation factor, and the forms that keep it by Hessian action.

Derived in chapter 6. A factor serves layers of one shape at once: `B` counts the groups of all of them. The low-rank
form has a room of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kfqn_core.estimate.inverses import DenseInverse, append_together, positive_inverse
from kfqn_core.estimate.statistics import Statistics
from kfqn_core.maths.columns import Columns
from kfqn_core.maths.secant import times

EVERYWHERE = torch.tensor(True, device="cpu")
DECAY = 0.9  # weight of the past in the running averages of the forms that keep less than a matrix


class Sizes(Protocol):
    """What a factor asks of a layer: a `LayerView` is one."""

    @property
    def groups(self) -> int: ...

    @property
    def d_in(self) -> int: ...


class Activation(Protocol):
    """What the optimizer asks of an activation factor. A new kind is a class with these members.

    Attributes:
        damping: `lambda_A`, a number or `[B, 1]`; it may be changed between updates.
        every_step: whether it learns from every mini-batch, and not only when curvature is updated.
        read: the names of those of its tensors that `precondition` reads.
    """

    damping: float | Tensor
    read: tuple[str, ...]

    @property
    def every_step(self) -> bool: ...

    @property
    def H(self) -> Tensor:
        """`H_a`, `[B, d_in, d_in]`: for inspection and tests."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name, `[B, ...]` each."""

    def start(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> Tensor:
        """From the first mini-batch, where `where` (`[B]`, or one for all) and finite; returns where it was so."""

    def start_from(self, A: Tensor, where: Tensor = EVERYWHERE) -> Tensor:
        """`start` from a formed `A` `[B, d_in, d_in]`: the warm start."""

    def average(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> None:
        """Learn from a mini-batch in whose step curvature is not updated, if `every_step`."""

    def update(
        self, statistics: Statistics, where: Tensor = EVERYWHERE, decay: float = DECAY, probe: Tensor | None = None
    ) -> None:
        """One update, where `where` holds and the result is finite.

        Args:
            statistics: of a mini-batch.
            where: bool, `[B]` or one for all.
            decay: weight of the past in a running form.
            probe: what `probe` gives, if that is known already.
        """

    def probe(self, statistics: Statistics) -> Tensor | None:
        """Along what an update asks for the action of `A`, `[B, d_in]` or `[B, d_in, k]`; None if it does not."""

    def precondition(self, M: Columns, *, out: Tensor | None = None) -> Tensor:
        """`M H_a`, `[B, d_out, d_in]`, written to `out` if it is given."""


class ActivationFactor:
    """`H_a`, by Hessian action: a BFGS update whose pair is `(H_a abar, (A + lambda_A I) H_a abar)`.

    The curvature along the pair is exact, `s'y = s'(A + lambda_A I)s > 0`, so no damping is needed (chapter 6).

    Args:
        sizes: `groups`, of all layers together (B), and `d_in`.
        damping: `lambda_A`, added to the diagonal of `A`.
        decay: weight of the past in the running average of `A`. `None` keeps no `A` at all: its action is taken from
            the current mini-batch, without forming it.
        shrunk: whether the first mini-batch counts as a sample that it is (`towards_diagonal`); else, as in the papers,
            its `A` as the truth.

    Attributes:
        A: `[B, d_in, d_in]` running average, or `None`.
        inverse: `H_a`, `[B, d_in, d_in]`; the identity until `start`.
    """

    read: tuple[str, ...] = ("H_a",)

    def __init__(
        self, sizes: Sizes, damping: float | Tensor, decay: float | None, *, dtype: torch.dtype, device: torch.device,
        shrunk: bool = False,
    ):  # fmt: skip
        self.damping = damping
        self.decay, self.shrunk = decay, shrunk
        shape = (sizes.groups, sizes.d_in, sizes.d_in)
        self.A = None if decay is None else torch.zeros(shape, dtype=dtype, device=device)
        self.inverse = DenseInverse(sizes.d_in, groups=sizes.groups, dtype=dtype, device=device)

    @property
    def every_step(self) -> bool:
        """A running average looks at every mini-batch."""
        return self.A is not None

    @property
    def H(self) -> Tensor:
        """`H_a`, `[B, d_in, d_in]`."""
        return self.inverse.H

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        average = {} if self.A is None else {"A": self.A}
        return {**average, "H_a": self.inverse.H}

    def start(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> Tensor:
        """`start_from` the `A` of the first mini-batch, `shrunk` or not."""
        A = statistics.second_moment()
        return self.start_from(towards_diagonal(A, statistics.vectors()) if self.shrunk else A, where)

    def start_from(self, A: Tensor, where: Tensor = EVERYWHERE) -> Tensor:
        """`H_a = (A + lambda_A I)^-1`, the only inversion of its life, where `where` holds and `A` is finite.

        Args:
            A: `[B, d_in, d_in]`, from a warm start or the first mini-batch.
            where: bool, `[B]`.

        Returns:
            Where it was so, bool `[B]`.
        """
        H = self.inverse.H
        A = A.to(H.dtype)
        where = where & (torch.linalg.vector_norm(A, torch.inf, dim=(-2, -1)) < torch.inf)
        matrices = where.reshape(-1, 1, 1)
        A = torch.where(matrices, A, 0.0)
        if self.A is not None:
            self.A.copy_(torch.where(matrices, A, self.A))
        H.copy_(torch.where(matrices, positive_inverse(A, _vector(self.damping)), H))
        return where

    def precondition(self, M: Columns, *, out: Tensor | None = None) -> Tensor:
        """`M H_a`, one product of matrices."""
        return M.times(self.inverse.H, out=out)

    def average(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> None:
        """`A <- decay A + (1 - decay) A_batch` where `where` `[B]` holds.

        Raises:
            ValueError: if no average is kept.
        """
        if self.A is None or self.decay is None:
            raise ValueError("this factor keeps no A: it was made with decay=None; give a decay in [0, 1)")
        A = statistics.second_moment().to(self.A.dtype)
        self.A.lerp_(torch.where(where.reshape(-1, 1, 1), A, self.A), 1.0 - self.decay)

    def probe(self, statistics: Statistics) -> Tensor | None:
        """`s = H_a abar`, `[B, d_in]`; None where the action is that of the running `A`."""
        return self._step(statistics) if self.A is None else None

    def _step(self, statistics: Statistics) -> Tensor:
        return times(self.inverse.H, statistics.mean_input().to(self.inverse.H))  # on "meta" where another has H_a

    def pair(self, statistics: Statistics, s: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """`s = H_a abar`, `y = (A + lambda_A I) s` and abar, `[B, d_in]` each; `s` if it is not known yet."""
        H = self.inverse.H
        a_mean = statistics.mean_input().to(H.dtype)
        s = self._step(statistics) if s is None else s
        action = statistics.activation_action(s).to(H.dtype) if self.A is None else times(self.A, s)
        damped = action + self.damping * s if isinstance(self.damping, Tensor) else action.add(s, alpha=self.damping)
        return s, damped, a_mean

    def update(
        self, statistics: Statistics, where: Tensor = EVERYWHERE, decay: float = DECAY, probe: Tensor | None = None
    ) -> None:
        """One BFGS update with `pair`, where `where` `[B]` holds and the pair is `acceptable`."""
        update_together([self], [statistics], [where], [probe])


def towards_diagonal(A: Tensor, vectors: float | Tensor) -> Tensor:
    """`A` of a sample of input vectors, shrunk to its diagonal by the share `d_in / (d_in + vectors)`.

    Of fewer vectors than inputs `A` has directions without any curvature, in which `H_a` would be `1 / lambda_A`, and
    stay so: an update changes `H_a` along one direction. The fewer vectors, the less do entries off the diagonal say
    (Ledoit & Wolf 2004); the share is the simplest one that falls from 1 to 0 (benchmarks/NOTES.md).

    Args:
        A: `[B, d_in, d_in]`.
        vectors: how many there were; a number, or `[B]`.
    """
    keep = vectors / (vectors + A.shape[-1])
    shrunk = A * (keep.to(A.dtype).view(-1, 1, 1) if isinstance(keep, Tensor) else keep)
    shrunk.diagonal(dim1=-2, dim2=-1).copy_(A.diagonal(dim1=-2, dim2=-1))
    return shrunk


def update_together(
    factors: Sequence[Activation], statistics: Sequence[Statistics], where: Sequence[Tensor],
    probes: Sequence[Tensor | None] | None = None,
) -> None:  # fmt: skip
    """`update` of the factors of several groups of layers; pairs of all that have one are taken in together.

    Args:
        factors, statistics, where: as for `update`; each `where` is `[B]`, or one for all.
        probes: `probe` of the factors that have one, where it is known already.
    """
    pairs, inverses, keep = [], [], []
    for factor, batch, own, s in zip(factors, statistics, where, probes or [None] * len(factors), strict=True):
        if type(factor) is ActivationFactor:
            pairs.append(factor.pair(batch, s))
            inverses.append(factor.inverse)
            keep.append(own.expand(len(factor.H)))
        else:
            factor.update(batch, own, probe=s)
    append_together(inverses, pairs, keep)


class ExactActivationFactor(ActivationFactor):
    """`H_a` by inverting `A + lambda_A I` at every update: what the Hessian action approximates (chapter 6).

    The `A` is the running average, or with `decay=None` that of the current mini-batch. For comparison: it has not been
    found to train better.
    """

    def probe(self, statistics: Statistics) -> None:
        """It asks for `A` as a whole."""

    def update(
        self, statistics: Statistics, where: Tensor = EVERYWHERE, decay: float = DECAY, probe: Tensor | None = None
    ) -> None:
        """Invert, where `where` `[B]` holds and the result is finite."""
        H = self.inverse.H
        A = statistics.second_moment().to(H.dtype) if self.A is None else self.A
        where = where & (torch.linalg.vector_norm(A, torch.inf, dim=(-2, -1)) < torch.inf)
        A = torch.where(where.reshape(-1, 1, 1), A, 0.0)
        H.copy_(torch.where(where.reshape(-1, 1, 1), positive_inverse(A, _vector(self.damping)), H))


class DiagonalActivationFactor:
    """`H_a = diag(1 / (d + lambda_A))` with the running diagonal `d` of `A`.

    Where nothing else is in `A` (embeddings), or where more would cost more than the weight itself: `d_in` numbers for
    each group.

    Attributes:
        d: `[B, d_in]`.
    """

    every_step = False
    read: tuple[str, ...] = ("d",)

    def __init__(self, sizes: Sizes, damping: float | Tensor, *, dtype: torch.dtype, device: torch.device):
        self.damping = damping
        self.d = torch.ones(sizes.groups, sizes.d_in, dtype=dtype, device=device)

    @property
    def e(self) -> Tensor:
        """The diagonal of `H_a`, `[B, d_in]`."""
        return 1 / (self.d + self.damping)

    @property
    def H(self) -> Tensor:
        """`H_a` as a matrix, `[B, d_in, d_in]`: for inspection and tests."""
        return torch.diag_embed(self.e)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        return {"d": self.d}

    def start(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> Tensor:
        """`d` of the first mini-batch."""
        return self._take(statistics.diagonal(), where, 0.0)

    def start_from(self, A: Tensor, where: Tensor = EVERYWHERE) -> Tensor:
        """`d` of a formed `A`."""
        return self._take(A.diagonal(dim1=-2, dim2=-1), where, 0.0)

    def average(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> None:
        """Nothing: it learns when curvature is updated."""

    def probe(self, statistics: Statistics) -> None:
        """It asks for the diagonal alone."""

    def update(
        self, statistics: Statistics, where: Tensor = EVERYWHERE, decay: float = DECAY, probe: Tensor | None = None
    ) -> None:
        """`d <- decay d + (1 - decay) d_batch`."""
        self._take(statistics.diagonal(), where, decay)

    def _take(self, d: Tensor, where: Tensor, decay: float) -> Tensor:
        """The running diagonal, from `d` `[B, d_in]`, where `where` `[B]` holds and it is finite; returns where."""
        d = d.to(self.d.dtype)
        where = where & (torch.linalg.vector_norm(d, torch.inf, dim=-1) < torch.inf)
        self.d.lerp_(torch.where(where.reshape(-1, 1), d, self.d), 1.0 - decay)
        return where

    def precondition(self, M: Columns, *, out: Tensor | None = None) -> Tensor:
        """`M H_a`, entry by entry."""
        return M.scaled(self.e, out=out)


def _vector(damping: float | Tensor) -> float | Tensor:
    """A number, or `[B]` from `[B, 1]`."""
    return damping.squeeze(-1) if isinstance(damping, Tensor) else damping
