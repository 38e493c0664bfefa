"""Inverse Hessian estimates that pairs are appended to, for layers of one shape at once.

`B` matrices, one for each group of each layer, lie side by side in one tensor that is allocated once and updated in
place, so that a step reads nothing on the host and its addresses do not move. Whether a pair is good enough to be used
is a tensor too: a refused pair changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kfqn_core.maths.secant import (
    LimitedMemoryInverse,
    add_squares_,
    bfgs_inverse_update_,
    inner_products,
    times,
    trace,
    two_squares,
)

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
    return _acceptable(torch.linalg.vecdot(s, y), torch.linalg.vecdot(s, s), torch.linalg.vector_norm(v, dim=-1))


def _acceptable(sy: Tensor, ss: Tensor, length_v: Tensor) -> Tensor:
    return (sy > CURVATURE_TEST * ss * length_v) & (sy < torch.inf)


class DenseInverse:
    """Dense inverse Hessian estimates: `H`, `[B, size, size]`, the identity at first.

    `append`, `apply` and `dense` are those of a `LimitedMemoryInverse`.
    """

    def __init__(
        self, size: int, *, groups: int = 1, dtype: torch.dtype | None = None, device: torch.device | None = None
    ):
        self.H = torch.eye(size, dtype=dtype, device=device).repeat(groups, 1, 1)

    def append(self, s: Tensor, y: Tensor, keep: Tensor) -> None:
        """BFGS updates with the pairs `s, y` `[B, size]`, where `keep` `[B]` holds and the result is finite."""
        bfgs_inverse_update_(self.H, s, y, keep)

    def apply(self, V: Tensor) -> Tensor:
        """`H V` for `V` `[B, n, k]`."""
        return torch.bmm(self.H, V)

    def dense(self) -> Tensor:
        """`H` itself, `[B, n, n]`."""
        return self.H


Inverse = DenseInverse | LimitedMemoryInverse


def append_together(
    inverses: Sequence[DenseInverse], pairs: Sequence[tuple[Tensor, Tensor, Tensor]], keep: Sequence[Tensor]
) -> None:
    """`append` to estimates of several sizes, of what is `acceptable`: what concerns numbers alone is done once.

    Args:
        inverses: with `B` matrices each, on one device and of one dtype.
        pairs: for each of them `s`, `y` and `v`, `[B, size]`.
        keep: for each of them bool `[B]`.
    """
    if not inverses:
        return
    each = [inner_products(s, times(inverse.H, y), y, v) for inverse, (s, y, v) in zip(inverses, pairs, strict=True)]
    products = torch.cat([of_pairs for _, of_pairs in each])  # [sum of B, 4, 4]
    traces = torch.cat([trace(inverse.H) for inverse in inverses])
    C, largest = two_squares(products, traces.dtype)
    fits = 2 * largest + traces < torch.finfo(traces.dtype).max
    good = _acceptable(products[:, 0, 2], products[:, 0, 0], products[:, 3, 3].sqrt()) & fits & torch.cat(list(keep))
    sizes = [len(inverse.H) for inverse in inverses]
    for inverse, (V, _), own_C, own in zip(inverses, each, C.split(sizes), good.split(sizes), strict=True):
        add_squares_(inverse.H, V, own_C, own)


def positive_inverse(A: Tensor, damping: float | Tensor) -> Tensor:
    """`(A + damping I)^-1` of positive semidefinite matrices, positive definite whatever rounding did to `A`.

    `H = L^-T L^-1` with the Cholesky factor `L` is positive semidefinite as it is formed. Float32 resolves no
    eigenvalue of A that is smaller than a rounding error of its trace, which is therefore added to the damping; where
    there is no factor all the same, or one whose inverse exceeds `1 / damping` on its diagonal, the inverse of the
    diagonal of A stands for it. No value is read on the host.

    Args:
        A: `[B, n, n]`, symmetric, of a real dtype in which `torch.linalg` works.
        damping: a positive number, or `[B]`.

    Returns:
        `[B, n, n]`, symmetric to the last bit. Not finite where A is not.
    """
    n = A.shape[-1]
    diagonal = A.diagonal(dim1=-2, dim2=-1)  # [B, n]
    shift = damping + torch.finfo(A.dtype).eps * diagonal.sum(-1)  # [B]
    identity = torch.eye(n, dtype=A.dtype, device=A.device)
    factor, info = torch.linalg.cholesky_ex(A + shift[:, None, None] * identity)
    L_inv = torch.linalg.solve_triangular(factor, identity.expand_as(A), upper=False)
    H = L_inv.mT @ L_inv
    H = (H + H.mT) / 2  # to the last bit, which not every product is
    largest = H.diagonal(dim1=-2, dim2=-1).amax(-1)  # [B]; NaN compares as false
    sound = (info == 0) & (largest * damping <= 1 + 1e-3)
    plain = torch.diag_embed(1 / (diagonal + shift[:, None]))
    return torch.where(sound[:, None, None], H, plain)
