"""`H_a` without a matrix of `d_in x d_in`: the largest directions of `A`, and its diagonal for all the others.

`A` is written as `F F^T + diag(d - |F|^2)`, where `F` `[d_in, rank]` follows its leading eigenspace, `d` is its exact
diagonal, and `|F|^2` are the squared lengths of the rows of `F`. Nothing of size `d_in x d_in` exists at any time, and
the state is smaller than the layer's weight wherever that has more than `2 rank + 2` rows (derived in chapter 6).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kfqn_core.estimate.hooks import Record
from kfqn_core.layers import LayerView

DECAY = 0.9  # weight of the past in the running averages of A's action and of its diagonal
POWER_ITERATIONS = 2  # at the start, from random directions
ROWS = 4096  # input vectors (samples times locations) that an update looks at: more cost time and add little
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
    """`H_a = (F F^T + diag(max(d - |F|^2, 0)) + lambda_A I)^-1`, used as `factors.ActivationFactor` is.

    One step of subspace iteration per update: `Y = A Q` for an orthonormal basis `Q` of the columns of `F`, with the
    mini-batch in a running average, and `F` from Nystroem's formula. The inverse is Woodbury's:
    `diag(e) - B B^T` with `e` the inverse of the diagonal part.

    Args:
        view: the layer.
        damping: `lambda_A`; it may be changed between updates.
        rank: number of columns of `F`.

    Attributes:
        F: `[groups, d_in, rank]`.  d: `[groups, d_in]`, running diagonal of `A`.
        B: `[groups, d_in, rank]`.  e: `[groups, d_in]`; `H_a = diag(e) - B B^T`.
        A: None, as for every factor that keeps no `A`.
        started: whether `start` has been called; until then `H_a` is the identity.
    """

    A = None

    def __init__(self, view: LayerView, damping: float, rank: int, *, dtype: torch.dtype, device: torch.device):
        self.damping = damping
        self.F = torch.zeros(view.groups, view.d_in, rank, dtype=dtype, device=device)
        self.B = torch.zeros_like(self.F)
        self.d = torch.zeros(view.groups, view.d_in, dtype=dtype, device=device)
        self.e = torch.ones_like(self.d)
        self.started = False

    @property
    def H(self) -> Tensor:
        """`H_a` as a matrix, `[groups, d_in, d_in]`: for inspection and tests."""
        return torch.diag_embed(self.e) - self.B @ self.B.mT

    def tensors(self) -> dict[str, Tensor]:
        """Everything that lives from one step to the next, by name."""
        return {"F": self.F, "d": self.d, "B": self.B, "e": self.e}

    def start(self, A: Tensor) -> None:
        """From a formed `A` `[groups, d_in, d_in]`: the warm start. A non-finite `A` counts as zero."""
        self._start(lambda V: A.to(V.dtype) @ V, A.diagonal(dim1=-2, dim2=-1))

    def start_from(self, record: Record) -> None:
        """From the first mini-batch, without forming `A`."""
        self._start(record.activation_action, record.diagonal())

    def _start(self, action: Callable[[Tensor], Tensor], diagonal: Tensor) -> None:
        # The same directions on every machine and device, and nobody else's random numbers are touched.
        generator = torch.Generator().manual_seed(0)
        Q = torch.randn(self.F.shape, generator=generator, dtype=torch.float64).to(self.F)
        for _ in range(POWER_ITERATIONS):
            Q = torch.linalg.qr(torch.nan_to_num(action(torch.linalg.qr(Q).Q).to(Q.dtype))).Q
        F, d = nystroem(Q, action(Q).to(Q.dtype)), diagonal.to(self.d.dtype)
        finite = torch.isfinite(F).all() & torch.isfinite(d).all()
        self.F.copy_(torch.where(finite, F, 0.0))
        self.d.copy_(torch.where(finite, d, 0.0))
        self._invert()
        self.started = True

    def update(self, record: Record, finite: Tensor) -> None:
        """One subspace iteration on the running `A`, where `finite` holds and the result is finite."""
        Q = self._basis()
        past = self.F @ (self.F.mT @ Q)
        record = record.thinned(ROWS)
        F = nystroem(Q, past.lerp(record.activation_action(Q).to(past.dtype), 1.0 - DECAY))
        d = record.diagonal().to(self.d.dtype)
        finite = finite & (torch.linalg.vector_norm(F) + torch.linalg.vector_norm(d) < torch.inf)
        self.F.copy_(torch.where(finite, F, self.F))
        self.d.lerp_(torch.where(finite, d, self.d), 1.0 - DECAY)
        self._invert()

    def precondition(self, M: Tensor) -> Tensor:
        """`M H_a` for `M` `[groups, d_out, d_in]`."""
        return (M * self.e[..., None, :]).baddbmm_(M @ self.B, self.B.mT, alpha=-1)

    def _basis(self) -> Tensor:
        """An orthonormal basis of the columns of `F`, completed by waves where `F` has fewer than `rank` directions.

        Inputs may have had no part yet in as many directions. Without the waves rounding errors would choose new ones.
        """
        n, rank = self.F.shape[-2:]
        at, half_periods = (torch.arange(0.5, k, dtype=self.F.dtype, device=self.F.device) for k in (n, rank))
        waves = torch.cos(torch.outer(at, half_periods * (torch.pi / rank)))
        size = torch.linalg.vector_norm(self.F, dim=(-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        return torch.linalg.qr(torch.addcmul(self.F, waves, size, value=COMPLETION / n**0.5)).Q

    def _invert(self) -> None:
        """Woodbury: `(E^-1 + F F^T)^-1 = E - E F (I + F^T E F)^-1 F^T E` with `E = diag(e)`."""
        e = torch.reciprocal((self.d - torch.linalg.vecdot(self.F, self.F)).clamp_min(0.0) + self.damping)
        EF = e[..., None] * self.F
        core = self.F.mT @ EF
        core.diagonal(dim1=-2, dim2=-1).add_(1.0)
        B = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(core).L.mT, EF, upper=True, left=False)
        self.B.copy_(B)
        self.e.copy_(e)
