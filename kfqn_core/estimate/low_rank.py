"""`H_a` without a matrix of `d_in x d_in`: the largest directions of `A`, and its diagonal for all the others.

`A` is written as `F F^T + diag(d - |F|^2)`, where `F` `[d_in, rank]` follows its leading eigenspace, `d` is its exact
diagonal, and `|F|^2` are the squared lengths of the rows of `F`. Nothing of size `d_in x d_in` exists at any time, and
the state is smaller than the layer's weight wherever that has more than `2 rank + 2` rows (derived in chapter 6).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfqn_core.estimate.activation import DECAY, EVERYWHERE, Sizes
from kfqn_core.estimate.statistics import Statistics
from kfqn_core.maths.columns import Columns

POWER_ITERATIONS = 2  # at the start, from random directions
COMPLETION = 1e-4  # weight of the directions that complete the basis, relative to the norm of F
SHIFT = 1e-6  # added to the small matrix, relative to its trace: float32 resolves no smaller eigenvalue of A


def nystroem(Q: Tensor, Y: Tensor) -> Tensor:
    """`F` with `F F^T = Y (Q^T Y)^-1 Y^T`, the best that is known of a positive semidefinite `A` from `Y = A Q`.

    Equal to `A` on the columns of `Q`, and to `A` itself if its rank is at most their number (Nystroem's formula;
    Halko, Martinsson & Tropp 2011, section 5.4), up to the shift `SHIFT` that keeps the small matrix invertible.

    Args:
        Q: `[..., n, rank]` with orthonormal columns.
        Y: `[..., n, rank]`, `A Q`.

    Returns:
        `[..., n, rank]`; not a number where `Y` is not finite or zero.
    """
    core = Q.mT @ Y
    core = (core + core.mT) / 2
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(SHIFT * diagonal.sum(-1, keepdim=True))
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(core).L.mT, Y, upper=True, left=False)


class LowRankActivationFactor:
    """`H_a = (F F^T + diag(max(d - |F|^2, 0)) + lambda_A I)^-1`, used as `activation.ActivationFactor` is.

    One step of subspace iteration per update: `Y = A Q` for an orthonormal basis `Q` of the columns of `F`, with the
    mini-batch in a running average, and `F` from Nystroem's formula. The inverse is Woodbury's:
    `diag(e) - B B^T` with `e` the inverse of the diagonal part.

    Args:
        sizes: `groups`, of all layers together (B), and `d_in`.
        damping: `lambda_A`; it may be changed between updates.
        rank: number of columns of `F`.

    Attributes:
        F: `[B, d_in, rank]`.
        d: `[B, d_in]`, running diagonal of `A`.
        B: `[B, d_in, rank]`.
        e: `[B, d_in]`; `H_a = diag(e) - B B^T`, the identity until `start`.
    """

    every_step = False
    read: tuple[str, ...] = "B", "e"

    def __init__(
        self, sizes: Sizes, damping: float | Tensor, rank: int, *, dtype: torch.dtype, device: torch.device
    ):  # fmt: skip
        self.damping = damping
        self.F = torch.zeros(sizes.groups, sizes.d_in, rank, dtype=dtype, device=device)
        self.B = torch.zeros_like(self.F)
        self.d = torch.zeros(sizes.groups, sizes.d_in, dtype=dtype, device=device)
        self.e = torch.ones_like(self.d)

    @property
    def H(self) -> Tensor:
        """`H_a` as a matrix, `[B, d_in, d_in]`: for inspection and tests."""
        return torch.diag_embed(self.e) - self.B @ self.B.mT

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        return {"F": self.F, "d": self.d, "B": self.B, "e": self.e}

    def start(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> Tensor:
        """From the first mini-batch, without forming `A`."""
        return self._start(statistics.activation_action, statistics.diagonal(), where)

    def start_from(self, A: Tensor, where: Tensor = EVERYWHERE) -> Tensor:
        """From a formed `A` `[B, d_in, d_in]`."""
        return self._start(lambda V: A.to(V.dtype) @ V, A.diagonal(dim1=-2, dim2=-1), where)

    def _start(self, action: Callable[[Tensor], Tensor], diagonal: Tensor, where: Tensor) -> Tensor:
        # The same directions in every layer, on every machine and device, and nobody else's random numbers are touched.
        generator = torch.Generator("cpu").manual_seed(0)
        shape = self.F.shape[-2:]
        Q = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.F.dtype)
        Q = Q.pin_memory() if self.F.is_cuda else Q  # or the host would wait for the copy
        Q = Q.to(self.F.device, non_blocking=True).expand_as(self.F)
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(torch.nan_to_num(action(torch.linalg.qr(Q).Q).to(Q.dtype))).Q
        return self._take(nystroem(Q, action(Q).to(Q.dtype)), diagonal, where, 0.0)

    def average(self, statistics: Statistics, where: Tensor = EVERYWHERE) -> None:
        """Nothing: it learns when curvature is updated."""

    def update(
        self, statistics: Statistics, where: Tensor = EVERYWHERE, decay: float = DECAY, probe: Tensor | None = None
    ) -> None:  # fmt: skip
        """One subspace iteration on the running `A`, where `where` holds and the result is finite; `probe` if known."""
        Q = self.probe(statistics) if probe is None else probe
        past = self.F @ (self.F.mT @ Q)  # [B, d_in, rank]
        F = nystroem(Q, past.lerp(statistics.activation_action(Q).to(past.dtype), 1.0 - decay))
        self._take(F, statistics.diagonal(), where, decay)

    def _take(self, F: Tensor, d: Tensor, where: Tensor, decay: float) -> Tensor:
        """`F`, and the running diagonal, where `where` holds and both are finite; returns where that was so."""
        d = d.to(self.d.dtype)
        size = torch.linalg.vector_norm(F, torch.inf, dim=(-2, -1)) + torch.linalg.vector_norm(d, torch.inf, dim=-1)
        where = where & (size < torch.inf)  # [B]
        self.F.copy_(torch.where(where.reshape(-1, 1, 1), F, self.F))
        self.d.lerp_(torch.where(where.reshape(-1, 1), d, self.d), 1.0 - decay)
        self._invert(where)
        return where

    def precondition(self, M: Columns, *, out: Tensor | None = None) -> Tensor:
        """`M H_a = M diag(e) - (M B) B^T`, two products with a thin matrix; `[B, d_out, d_in]`."""
        joined = Columns(M.joined(), None)
        return joined.scaled(self.e, out=out).baddbmm_(joined.times(self.B), self.B.mT, alpha=-1)

    def probe(self, statistics: Statistics) -> Tensor:
        """Along what an update asks for the action of `A`, `[B, d_in, rank]`: an orthonormal basis of the columns
        of `F`, completed by waves where `F` has fewer than `rank` directions. The mini-batch has no part in it.

        Inputs may have had no part yet in as many directions. Without the waves rounding errors would choose new ones.
        """
        n, rank = self.F.shape[-2:]
        at, half_periods = (torch.arange(0.5, k, dtype=self.F.dtype, device=self.F.device) for k in (n, rank))
        waves = torch.cos(torch.outer(at, half_periods * (torch.pi / rank)))  # [n, rank]
        size = torch.linalg.vector_norm(self.F, dim=(-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        return torch.linalg.qr(torch.addcmul(self.F, waves, size, value=COMPLETION / n**0.5)).Q

    def _invert(self, where: Tensor) -> None:
        """Woodbury's formula (chapter 6), where `where` `[B]` holds: with `E = diag(e)`,
        `(E^-1 + F F^T)^-1 = E - E F (I + F^T E F)^-1 F^T E`.
        """
        e = torch.reciprocal((self.d - torch.linalg.vecdot(self.F, self.F)).clamp_min(0.0) + self.damping)
        EF = e[..., None] * self.F
        core = self.F.mT @ EF
        core.diagonal(dim1=-2, dim2=-1).add_(1.0)
        B = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(core).L.mT, EF, upper=True, left=False)
        self.B.copy_(torch.where(where.reshape(-1, 1, 1), B, self.B))
        self.e.copy_(torch.where(where.reshape(-1, 1), e, self.e))
