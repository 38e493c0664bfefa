"""The running estimates of the two factors of one layer: `H_a ~ (A + lambda_A I)^-1` and `H_g ~ G^-1`.

Both are kept by BFGS updates and never by a repeated inversion (derived in chapters 6 and 7). Every tensor is
allocated once and updated in place, so that a step reads nothing on the host and its addresses do not move. Whether a
pair is good enough to be used is a tensor too: a refused pair writes the old values back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kfqn_core.estimate.hooks import Record
from kfqn_core.layers import LayerView
from kfqn_core.maths.damping import double_damping, levenberg_marquardt, powell_on_inverse
from kfqn_core.maths.secant import LimitedMemoryInverse, bfgs_inverse_update_, row_blocks, stacked_rows

CURVATURE_TEST = 1e-4
"""A pair is used only if `s'y > 1e-4 ||s||^2 ||v||` (the authors' public code of 2020)."""


def acceptable(s: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Whether a BFGS pair is worth using: finite, and `s'y > 1e-4 ||s||^2 ||v||`, hence positive.

    Args:
        s, y: `[..., n]`, the (damped) pair.
        v: `[..., k]`, the vector whose norm sets the scale: the mean gradient for `H_g`, the mean input for `H_a`.

    Returns:
        Boolean `[...]`. False for anything that is not finite: a comparison with NaN is false.
    """
    sy, ss = torch.linalg.vecdot(s, y), torch.linalg.vecdot(s, s)
    return (sy > CURVATURE_TEST * ss * torch.linalg.vector_norm(v, dim=-1)) & (sy < torch.inf)


LARGE = 2**16  # entries of a product that a processor's nearest cache does not hold
LONGEST = 1024  # a vector that shares a tensor with shorter ones


def aligned_bmm(X: Tensor, Y: Tensor) -> Tensor:
    """`X Y` for `[b, m, k]` and `[b, k, n]`; memory rows of a large result begin at multiples of 64 bytes.

    The bias makes the number of inputs odd more often than not. Written to rows of odd length, a large product of
    matrices takes up to a third longer.
    """
    m, n = X.shape[1], Y.shape[2]
    if n == 1 or m * n < LARGE:
        return torch.bmm(X, Y)
    row = 64 // Y.element_size()
    out = Y.new_empty(X.shape[0], m, -(-n // row) * row)[..., :n]
    return out.baddbmm_(X, Y, beta=0.0)  # with 0 what was there is ignored, NaN included


class DenseInverse:
    """A dense inverse Hessian estimate: `H`, `[groups, size, size]`, the identity at first.

    `apply` and `dense` are those of a `LimitedMemoryInverse`; pairs enter by `append_pairs`.
    """

    def __init__(
        self, size: int, *, groups: int = 1, dtype: torch.dtype | None = None, device: torch.device | None = None
    ):
        self.H = torch.eye(size, dtype=dtype, device=device).repeat(groups, 1, 1)

    def apply(self, V: Tensor) -> Tensor:
        """`H V` for `V` `[groups, n, k]`."""
        return aligned_bmm(self.H, V)

    def dense(self) -> Tensor:
        """`H` itself, `[groups, n, n]`."""
        return self.H


class Pair(NamedTuple):
    """A pair that waits to enter an inverse: `s`, `y` and `v` `[groups, n]`, of which `v` sets the scale."""

    inverse: DenseInverse | LimitedMemoryInverse
    s: Tensor
    y: Tensor
    v: Tensor


def append_pairs(pairs: Sequence[Pair], finite: Tensor) -> None:
    """Update every inverse with its pair where that is `acceptable` and the boolean scalar `finite` holds.

    The dense ones are updated together: their vectors are judged, and changed, as the rows of one tensor.
    """
    together: dict[tuple[torch.dtype, int | None], list[Pair]] = {}
    for pair in pairs:
        if isinstance(pair.inverse, DenseInverse):
            together.setdefault(_shared_rows(pair.s), []).append(pair)
        else:
            pair.inverse.append(pair.s, pair.y, acceptable(pair.s, pair.y, pair.v) & finite)
    for dense in together.values():
        s, y, v = _as_rows([pair[1:] for pair in dense])
        bfgs_inverse_update_([pair.inverse.dense() for pair in dense], s, y, acceptable(s, y, v) & finite)


class ActivationFactor:
    """`H_a`, by Hessian action: a BFGS update whose pair is `(H_a abar, (A + lambda_A I) H_a abar)`.

    The curvature along the pair is exact, `s'y = s'(A + lambda_A I)s > 0`, so no damping is needed (chapter 6).

    Args:
        view: the layer.
        damping: `lambda_A`, added to the diagonal of `A`; it may be changed between updates.
        decay: weight of the past in the running average of `A`. `None` keeps no `A` at all: its action is taken from
            the current mini-batch, without forming it.

    Attributes:
        A: `[groups, d_in, d_in]` running average, or `None`.
        inverse: `H_a`, `[groups, d_in, d_in]`.
        started: whether `start` has been called; until then `H_a` is the identity.
    """

    def __init__(
        self, view: LayerView, damping: float, decay: float | None, *, dtype: torch.dtype, device: torch.device
    ):
        self.damping = damping
        self.decay = decay
        shape = (view.groups, view.d_in, view.d_in)
        self.A = None if decay is None else torch.zeros(shape, dtype=dtype, device=device)
        self.inverse = DenseInverse(view.d_in, groups=view.groups, dtype=dtype, device=device)
        self.started = False

    @property
    def H(self) -> Tensor:
        """`H_a`, `[groups, d_in, d_in]`."""
        return self.inverse.H

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        average = {} if self.A is None else {"A": self.A}
        return {**average, "H_a": self.inverse.H}

    def start(self, A: Tensor) -> None:
        """`H_a = (A + lambda_A I)^-1`, the only inversion of its life. A non-finite `A` counts as zero.

        Args:
            A: `[groups, d_in, d_in]`, from a warm start or the first mini-batch.
        """
        H = self.inverse.H
        A = A.to(H.dtype)
        A = torch.where(torch.isfinite(A).all(), A, 0.0)
        if self.A is not None:
            self.A.copy_(A)
        H.copy_(_inverse(A, self.damping))
        self.started = True

    def precondition(self, M: Tensor) -> Tensor:
        """`M H_a` for `M` `[groups, d_out, d_in]`."""
        return aligned_bmm(M, self.inverse.H)

    def start_from(self, record: Record) -> None:
        """`start` from the first mini-batch."""
        self.start(record.second_moment())

    def average(self, A: Tensor, finite: Tensor) -> None:
        """`A <- decay A + (1 - decay) A_batch` where `finite` holds."""
        if self.A is None or self.decay is None:
            raise ValueError("this factor keeps no A: it was made with decay=None; give a decay in [0, 1)")
        self.A.lerp_(torch.where(finite, A.to(self.A.dtype), self.A), 1.0 - self.decay)

    def pair(self, record: Record) -> Pair:
        """`(H_a abar, (A + lambda_A I) H_a abar)` for the layer's inputs in this mini-batch."""
        H = self.inverse.H
        a_mean = record.mean_input().to(H.dtype)
        s = torch.bmm(H, a_mean.unsqueeze(-1)).squeeze(-1)
        action = record.activation_action(s) if self.A is None else torch.bmm(self.A, s.unsqueeze(-1)).squeeze(-1)
        return Pair(self.inverse, s, torch.add(action.to(H.dtype), s, alpha=self.damping), a_mean)

    def update(self, record: Record, finite: Tensor) -> None:
        """One Hessian-action update of `H_a` alone, where `finite` holds; `append_pairs` does many layers at once."""
        append_pairs([self.pair(record)], finite)


class ExactActivationFactor(ActivationFactor):
    """`H_a` by inverting `A + lambda_A I` at every update: what the Hessian action approximates (chapter 6).

    The `A` is the running average, or with `decay=None` that of the current mini-batch. For comparison: it has not been
    found to train better.
    """

    def update(self, record: Record, finite: Tensor) -> None:
        """Invert, where `finite` holds and the result is finite."""
        H = self.inverse.H
        A = record.second_moment().to(H.dtype) if self.A is None else self.A
        inverse = _inverse(A, self.damping)
        H.copy_(torch.where(finite & torch.isfinite(inverse).all(), inverse, H))


def _inverse(A: Tensor, damping: float) -> Tensor:
    """`(A + damping I)^-1`."""
    damped = A + damping * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    # cholesky_ex does not check on the host; A + lambda I with lambda > 0 is positive definite.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(damped).L)
    return (inverse + inverse.mT) / 2  # to the last bit, which not every device's inverse is


class GradientFactor:
    """`H_g`, by damped BFGS on averaged pairs of mean pre-activations and their mean gradients (chapter 7).

    Args:
        view: the layer.
        damping: `lambda_G`, the `mu2` of the second damping; it may be changed between updates.
        pair_damping: `"double"`, D_P then D_I (2020), or `"levenberg-marquardt"`, D_P then D_LM (2021).
        memory: number of pairs of the limited-memory form, or `None` for a dense matrix.
        pair_momentum: weight of the past in the running averages of `s` and `y`.
        mu1: the first damping keeps `s'y >= mu1 y'H_g y`.

    Attributes:
        s_mean, y_mean: `[groups, d_out]`, the running averages, *before* damping: damping acts on copies.
        inverse: `H_g`, dense or limited-memory.
    """

    def __init__(
        self,
        view: LayerView,
        damping: float,
        memory: int | None,
        *,
        pair_damping: str,
        pair_momentum: float,
        mu1: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.mu1, self.damping = mu1, damping
        self.pair_damping = pair_damping
        self.pair_momentum = pair_momentum
        self.s_mean = torch.zeros(view.groups, view.d_out, dtype=dtype, device=device)
        self.y_mean = torch.zeros_like(self.s_mean)
        self.inverse: DenseInverse | LimitedMemoryInverse
        if memory is None:
            self.inverse = DenseInverse(view.d_out, groups=view.groups, dtype=dtype, device=device)
        else:
            self.inverse = LimitedMemoryInverse(view.d_out, memory, batch=(view.groups,), dtype=dtype, device=device)

    @property
    def options(self) -> tuple[Any, ...]:
        """What factors have in common whose pairs are damped together."""
        return self.pair_damping, self.mu1, self.damping, self.pair_momentum, self.s_mean.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        pairs = {"s_mean": self.s_mean, "y_mean": self.y_mean}
        if isinstance(self.inverse, DenseInverse):
            return {**pairs, "H_g": self.inverse.H}
        return {**pairs, "S": self.inverse.S, "Y": self.inverse.Y, "R_inv": self.inverse.R_inv}

    def update(self, s: Tensor, y: Tensor, g_mean: Tensor, finite: Tensor) -> None:
        """Update `H_g` alone with a `Change`; `damped_pairs` and `append_pairs` do many layers at once."""
        append_pairs(damped_pairs([Change(self, s, y, g_mean)], finite), finite)


class Change(NamedTuple):
    """What a step, or the next mini-batch, tells an `H_g`: `[groups, d_out]` each, means over samples and locations.

    `s` is the change of the mean pre-activation, `y` that of the mean per-sample gradient, `g_mean` the one before.
    """

    factor: GradientFactor
    s: Tensor
    y: Tensor
    g_mean: Tensor


def damped_pairs(changes: Sequence[Change], finite: Tensor) -> list[Pair]:
    """Average every change into its factor, and return damped copies of the averages.

    Layers with the same options share the tensor whose rows are their vectors. Of a row that is not finite, or where
    the boolean scalar `finite` does not hold, nothing enters the averages, and its pair is one that is refused.
    """
    together: dict[tuple[Any, ...], list[Change]] = {}
    for change in changes:
        together.setdefault((*change.factor.options, *_shared_rows(change.s)), []).append(change)
    return [pair for alike in together.values() for pair in damp_together(alike, finite)]


def damp_together(changes: Sequence[Change], finite: Tensor) -> list[Pair]:
    """`damped_pairs` of changes whose factors have the same options and may share rows."""
    factors = [change.factor for change in changes]
    first, shapes = factors[0], [factor.s_mean for factor in factors]
    s, y, g_mean = average_together(changes, finite)
    # A curvature that the damping lambda_G would bury anyway is rounding error where batch norm makes all mean
    # gradients zero. Powell's damping would turn s into the direction of that error: zero stands for it.
    size_s, size_y = (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) for vector in (s, y))
    noise = torch.finfo(s.dtype).eps ** 0.5 * first.damping * size_s
    y = torch.where(size_y > noise, y, 0.0)
    columns = row_blocks(y.unsqueeze(-1), shapes)
    products = [factor.inverse.apply(column) for factor, column in zip(factors, columns, strict=True)]
    H_y = stacked_rows(products).squeeze(-1)
    if first.pair_damping == "double":
        s, y = double_damping(H_y, s, y, first.mu1, first.damping)
    else:
        s, y = levenberg_marquardt(*powell_on_inverse(H_y, s, y, first.mu1), first.damping)
    blocks = (row_blocks(rows, shapes) for rows in (s, y, g_mean))
    return [Pair(factor.inverse, *vectors) for factor, *vectors in zip(factors, *blocks, strict=True)]


def average_together(changes: Sequence[Change], finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average changes into their factors: `s_mean`, `y_mean` and `g_mean` as rows, the last NaN for a refused pair."""
    factors = [change.factor for change in changes]
    dtype, keep = factors[0].s_mean.dtype, factors[0].pair_momentum
    rows = _as_rows([[vector.to(dtype) for vector in change[1:]] for change in changes])
    new, g_mean = rows[:2], rows[2]
    held = [factor.s_mean for factor in factors] + [factor.y_mean for factor in factors]
    means = stacked_rows(held).view_as(new)
    known = (finite & (torch.linalg.vector_norm(new, dim=(0, -1)) < torch.inf)).unsqueeze(-1)
    means.lerp_(torch.where(known, new, means), 1.0 - keep)
    torch._foreach_copy_(held, row_blocks(means.flatten(0, 1), held))
    return *means, torch.where(known, g_mean, torch.nan)


def _shared_rows(vector: Tensor) -> tuple[torch.dtype, int | None]:
    """Vectors `[groups, n]` with the same key may share a tensor as its rows, padded with zeros.

    Layers with groups have many rows, and very long rows are few: padding would cost more than it saves.
    """
    groups, n = vector.shape
    return vector.dtype, None if groups == 1 and n <= LONGEST else n


def _as_rows(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """k vectors `[groups, n]` of each of several layers: `[k, total groups, largest n]`, padded with zeros."""
    kinds = list(zip(*vectors, strict=True))
    return stacked_rows([vector for kind in kinds for vector in kind]).unflatten(0, (len(kinds), -1))
